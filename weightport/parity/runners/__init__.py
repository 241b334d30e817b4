"""Scripts that run one framework on given inputs: a job in, arrays out, as files.

`weightport parity` starts each in a process of its own, and those of a source framework under the
interpreter that has it: they import their framework, numpy and the files beside them, but nothing
of weightport.
"""
