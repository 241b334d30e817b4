"""Check a converted repo against its sources: check_parity.py REPO PYTHON FILE...

PYTHON is the interpreter that has the source framework. The command `weightport parity` does the
same and more; this is the shape of a script of your own.
"""

import sys

import weightport

if len(sys.argv) < 4:
    sys.exit(__doc__)
_, repo, python, *files = sys.argv

try:
    found = weightport.parity(repo, files, source_python=python)
except weightport.ConversionError as error:
    sys.exit(f"error: {error}")

for check in found.checks:
    verdict = "pass" if check.passed else "FAIL"
    print(
        f"{check.name:14} {verdict}  relative L2 {check.matched.relative_l2:.1e}, tolerance"
        f" {check.tolerance:.0e}"
    )
    if check.fault:
        print(f"  first wrong: {check.fault.module}, filled by {check.fault.row}")
sys.exit(0 if found.passed else 1)
