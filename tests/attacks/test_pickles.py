"""Malicious and damaged PyTorch checkpoints: refused in one line, nothing executed, time and memory bounded.

Every payload would leave a marker file if anything ran it; that many of them do is checked with Python's own pickle,
in a process of its own.
"""

from __future__ import annotations

import io
import random
import re
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightport.converters.checkpoint import SourceFile
from weightport.converters.errors import ConversionError
from weightport.converters.torch_file import is_torch, read_torch

from ..pickle_files import (
    EMPTY_DICT,
    EMPTY_LIST,
    FOUR,
    MARK,
    NONE,
    PROTO2,
    STOP,
    archive,
    call,
    legacy,
    mapping,
    name,
    number,
    pairs,
    program,
    raw,
    several,
    sizes,
    storage,
    tarred,
    tensor,
    text,
    written,
    zipped,
)

CONVERTERS = Path(__file__).resolve().parent.parent.parent
COMMAND = text("touch marker")
CODE = text("__import__('os').system('touch marker')")
FUNCTION = text("system")


@pytest.fixture(autouse=True)
def nothing_runs(place: Path) -> Iterator[None]:
    """No marker appears, and no module is imported."""
    modules = set(sys.modules)
    yield
    assert not list(place.rglob("marker"))
    assert set(sys.modules) == modules


def refusal(place: Path, content: bytes) -> str:
    """What the reader says to a file; one line that names it."""
    path = written(place / "model.ckpt", content)
    with pytest.raises(ConversionError) as caught:
        read_torch(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable(), repr(line)
    assert len(line) < 600
    return line.removeprefix(f"{path}: ")


# ---- names that must not be called, in the containers of a checkpoint

CALLED = {
    # the standard library, of any platform and version
    "os.system": COMMAND, "posix.system": COMMAND, "nt.system": COMMAND, "os.popen": COMMAND, "os.remove": COMMAND,
    "os.execv": several(COMMAND), "builtins.eval": CODE, "builtins.exec": CODE, "__builtin__.eval": CODE,
    "__builtin__.execfile": CODE, "__builtin__.apply": name("os.system"), "builtins.__import__": text("os"),
    "builtins.compile": CODE, "builtins.open": text("marker") + text("w"), "builtins.map": CODE, "io.open": COMMAND,
    "builtins.breakpoint": b"", "builtins.input": b"", "_io.FileIO": text("marker") + text("w"), "_io.open": COMMAND,
    "codecs.open": text("marker") + text("w"), "_codecs.lookup": COMMAND, "builtins.vars": COMMAND,
    "subprocess.Popen": COMMAND, "subprocess.call": COMMAND, "subprocess.getoutput": COMMAND, "pty.spawn": COMMAND,
    "commands.getoutput": COMMAND, "popen2.popen2": COMMAND, "posixpath.os.system": COMMAND, "runpy.run_path": COMMAND,
    "runpy._run_code": CODE, "importlib.import_module": text("this"), "imp.load_source": COMMAND, "code.interact": b"",
    "importlib.machinery.SourceFileLoader": COMMAND, "webbrowser.open": text("http://localhost"), "pdb.run": CODE,
    "antigravity.geohash": COMMAND, "this.s": b"", "bdb.Bdb": CODE, "cProfile.run": CODE, "profile.run": CODE,
    "timeit.timeit": CODE, "trace.Trace": CODE, "doctest.debug_script": CODE, "pydoc.pipepager": COMMAND + COMMAND,
    "pickle.loads": raw(b"cos\nsystem\n(S'touch marker'\ntR."), "_pickle.loads": raw(b"."), "cPickle.loads": raw(b"."),
    "pickle.Unpickler": raw(b"."), "marshal.loads": raw(b"c"), "shelve.open": COMMAND, "dbm.open": COMMAND,
    "types.CodeType": CODE, "types.FunctionType": CODE, "operator.attrgetter": FUNCTION, "operator.call": FUNCTION,
    "operator.methodcaller": FUNCTION, "_operator.attrgetter": FUNCTION, "functools.reduce": name("os.system"),
    "itertools.starmap": COMMAND, "shutil.rmtree": text("."), "shutil.copyfile": COMMAND, "pathlib.os.system": COMMAND,
    "tempfile.mktemp": b"", "socket.create_connection": COMMAND, "urllib.request.urlopen": COMMAND, "ssl.wrap": b"",
    "urllib2.urlopen": COMMAND, "http.client.HTTPSConnection": COMMAND, "smtplib.SMTP": COMMAND, "ftplib.FTP": COMMAND,
    "ctypes.CDLL": COMMAND, "_ctypes.dlopen": COMMAND, "asyncio.run": COMMAND, "threading.Thread": COMMAND,
    "multiprocessing.util.spawnv_passfds": COMMAND, "distutils.spawn.spawn": COMMAND, "venv.create": COMMAND,
    "logging.config.listen": b"", "idlelib.pyshell.ModifiedInterpreter": COMMAND, "lib2to3.pgen2.grammar.Grammar": b"",
    "ensurepip.bootstrap": b"", "site.execsitecustomize": b"", "sys.exit": b"", "sys.settrace": COMMAND, "gc.collect": b"",
    "atexit.register": name("os.system"), "signal.alarm": number(1), "zipimport.zipimporter": COMMAND,
    "zipfile.ZipFile": COMMAND, "tarfile.open": COMMAND, "sqlite3.connect": COMMAND, "mailcap.findmatch": COMMAND,
    "tkinter.Tcl": b"", "turtle.Screen": b"", "nturl2path.url2pathname": COMMAND, "ast.literal_eval": CODE,
    "typing.get_type_hints": CODE, "collections.namedtuple": CODE, "dataclasses.make_dataclass": CODE,
    "enum.unique": CODE, "_pyrepl.pager.pipe_pager": COMMAND, "asyncore.loop": b"", "string.templatelib.x": CODE,
    "test.support.script_helper.assert_python_ok": COMMAND, "unittest.mock._importer": COMMAND,
    # other packages: anything that is not a class
    "torch.load": COMMAND, "torch.storage._load_from_bytes": raw(b"."), "torch.hub.load": COMMAND, "torch.save": COMMAND,
    "torch.jit.load": COMMAND, "torch.serialization.load": COMMAND, "torch._utils.load": COMMAND,
    "torch.utils.cpp_extension.load_inline": COMMAND, "torch._dynamo.guards.eval": CODE, "torch.compile": CODE,
    "torch.jit.unsupported_tensor_ops.execWrapper": CODE, "torch.distributed.rpc.rpc_sync": COMMAND,
    "torch.utils.collect_env.run": COMMAND, "torch._inductor.codecache.compile_file": COMMAND,
    "numpy.testing._private.utils.runstring": CODE, "numpy.f2py.crackfortran.myeval": CODE, "numpy.load": COMMAND,
    "numpy.fromfile": COMMAND, "numpy.core.multiarray.fromfile": COMMAND, "numpy.distutils.exec_command.exec_command": COMMAND,
    "pip.main": COMMAND, "pip._internal.cli.main.main": COMMAND, "setuptools.setup": b"", "joblib.load": COMMAND,
    "dill.loads": raw(b"."), "cloudpickle.loads": raw(b"."), "pandas.read_pickle": COMMAND, "pandas.eval": CODE,
    "requests.get": COMMAND, "aiohttp.web.run_app": COMMAND, "tensorflow.io.write_file": COMMAND, "yaml.load": CODE,
    "tensorflow.keras.models.load_model": COMMAND, "keras.utils.get_file": COMMAND, "sympy.sympify": CODE,
    "transformers.pipeline": COMMAND, "ldm.util.instantiate_from_config": COMMAND, "__main__.run": COMMAND,
}  # fmt: skip
CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": archive, "legacy": legacy, "tar": tarred, "bare": program}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("called", CALLED)
def test_refused_by_the_name_it_calls(place: Path, called: str, container: str) -> None:
    value = mapping(optimizer=call(called, CALLED[called]))
    shown = called.replace("__builtin__", "builtins")
    assert re.fullmatch(
        f"it (names|calls) `{re.escape(shown)}`, which .*malicious", refusal(place, CONTAINERS[container](value))
    )


# ---- ways to call

SYSTEM = name("os.system")
ARGS = several(COMMAND)
STACKED = b"\x8c\x02os\x8c\x06system\x93"
OBJECT = MARK + name("ldm.Model") + b"o"
FORMS = {
    "REDUCE": SYSTEM + ARGS + b"R",
    "STACK_GLOBAL": STACKED + ARGS + b"R",
    "STACK_GLOBAL of a path": b"\x8c\x0dtorch._dynamo\x8c\x09os.system\x93" + ARGS + b"R",
    "STACK_GLOBAL through a class": b"\x8c\x05torch\x8c\x20serialization.os.system.__call__\x93" + ARGS + b"R",
    "STACK_GLOBAL of pieces in the memo": b"\x8c\x06system\x94" + b"0\x8c\x02os\x94" + b"h\x00\x93" + ARGS + b"R",
    "GLOBAL of a path": name("torch.serialization:os.system") + ARGS + b"R",
    "GLOBAL of Python 2": name("__builtin__.eval") + several(CODE) + b"R",
    "INST": MARK + COMMAND + b"ios\nsystem\n",
    "OBJ": MARK + SYSTEM + COMMAND + b"o",
    "NEWOBJ": SYSTEM + ARGS + b"\x81",
    "NEWOBJ_EX": SYSTEM + ARGS + EMPTY_DICT + b"\x92",
    "text protocol": b"cos\nsystem\n(S'touch marker'\ntR",
    "text protocol, tuple in the memo": b"(S'touch marker'\ntp9\n0cos\nsystem\ng9\nR",
    "not called at all": SYSTEM,
    "popped again": SYSTEM + ARGS + b"R0" + NONE,
    "behind a mark": MARK + SYSTEM + ARGS + b"R" + b"1" + NONE,
    "in the memo": SYSTEM + b"q\x05" + b"0" + b"h\x05" + ARGS + b"R",
    "as a key": pairs((SYSTEM + ARGS + b"R", NONE)),
    "as a default factory": call("collections.defaultdict", SYSTEM),
    "partial": call(call("functools.partial", SYSTEM, COMMAND)),
    "map in a list": call("builtins.list", call("builtins.map", SYSTEM, several(COMMAND))),
    "state with __setstate__": OBJECT + mapping(__setstate__=SYSTEM) + b"b" + COMMAND + b"b",
    "state with __reduce__": OBJECT + mapping(__reduce__=SYSTEM) + b"b",
    "class of a reconstructed object": call("copyreg._reconstructor", name("os._wrap_close"), name("builtins.object"), NONE),
    "hooks of a tensor": call("torch._utils._rebuild_tensor_v2", storage(), number(0), sizes(4), sizes(1), b"\x89", SYSTEM),
    "function of a tensor type": call("torch._tensor._rebuild_from_type_v2", SYSTEM, name("torch.Tensor"), ARGS, NONE),
    "type of a storage": several(text("storage"), SYSTEM, text("0"), text("cpu"), number(4)) + b"Q",
    "persistent id": call(SYSTEM, COMMAND) + b"Q",
    "numpy object array": call("numpy.core.multiarray._reconstruct", SYSTEM, sizes(0), raw(b"b")),
    "member of an enumeration": call("builtins.getattr", SYSTEM, text("__call__")),
    "nested pickle": call("pickle.loads", raw(PROTO2 + SYSTEM + ARGS + b"R.")),
    "nested in bytes of a storage": call("torch.storage._load_from_bytes", raw(PROTO2 + SYSTEM + ARGS + b"R.")),
}  # fmt: skip
NAMED = re.compile(
    r"it (names|calls) `(os\.(system|_wrap_close)|torch\._dynamo\.os\.system|torch\.serialization\.os\.system[._call]*|"
    r"builtins\.(eval|map)|pickle\.loads|torch\.storage\._load_from_bytes)`, which .*malicious"
)


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_refused_however_it_calls(place: Path, form: str, container: str) -> None:
    assert NAMED.fullmatch(refusal(place, CONTAINERS[container](mapping(w=tensor(), x=FORMS[form])))), form


CHAINS = {
    "getattr of a module": (call("builtins.getattr", text("os"), text("system")), r"`builtins\.getattr`"),
    "getattr of a result": (call("builtins.getattr", call("ldm.Model"), text("x")), r"`builtins\.getattr`"),
    "getattr of builtins": (call("builtins.getattr", name("builtins.dict"), text("get")), r"`builtins\.getattr`"),
    "getattr of a private name": (call("builtins.getattr", name("a.Model"), text("__init__")), r"`builtins\.getattr`"),
    "getattr of a function": (call("builtins.getattr", name("torch.load"), text("x")), r"`builtins\.getattr`"),
    "getattr of three": (call("builtins.getattr", name("a.Model"), text("x"), NONE), r"`builtins\.getattr`"),
    "call of an attribute": (call(call("builtins.getattr", name("a.Kind"), text("x"))), r"what `builtins\.getattr` returns"),
    "call of an object": (call(call("ldm.Model"), COMMAND), r"what `ldm\.Model` returns"),
    "call of a partial": (call(call("functools.partial", name("torch.load"))), r"what `functools\.partial` returns"),
    "call of a text": (call(text("os.system"), COMMAND), "a str"),
    "call of a dict": (call(EMPTY_DICT, COMMAND), "a dict"),
    "instance of a text": (text("os.system") + ARGS + b"\x81", "a str|str where Global"),
    "change of a class": (name("ldm.Model") + mapping(__reduce__=NONE) + b"b", r"it changes `ldm\.Model` itself"),
    "change of torch": (name("torch.Tensor") + mapping(__del__=NONE) + b"b", r"it changes `torch\.Tensor` itself"),
    "extension": (b"\x82\x01" + ARGS + b"R", r"instruction b'\\x82'"),
    "extension 2": (b"\x83\x01\x00", r"instruction b'\\x83'"),
    "extension 4": (b"\x84\x01\x00\x00\x00", r"instruction b'\\x84'"),
    "text persistent id": (b"Ptouch marker\n", "instruction b'P'"),
    "buffer outside": (b"\x97", r"instruction b'\\x97'"),
    "read-only buffer": (NONE + b"\x98", r"instruction b'\\x98'"),
    "copied top": (EMPTY_LIST + b"2" * 9, "instruction b'2'"),
    "no arguments": (name("ldm.Model") + NONE + b"R", "NoneType where tuple"),
    "name of a number": (number(1) + number(2) + b"\x93", "int where str"),
    "empty stack": (b"0" * 3, "a value is missing"),
    "empty memo": (b"h\x63", "a value is missing"),
    "no mark": (b"t", "value"),
    "left over": (NONE + NONE, "left over|value"),
    "key without value": (EMPTY_DICT + MARK + NONE + b"u", "a key without a value"),
    "key twice": (pairs((text("a"), NONE), (text("a"), NONE)), "`a` twice"),
    "item of a list": (EMPTY_LIST + text("a") + NONE + b"s", "list where dict"),
    "element of a dict": (EMPTY_DICT + NONE + b"a", "dict where list"),
    "element of a number": (number(1) + NONE + b"a", "int where list"),
    "newer protocol": (b"\x80\x06" + NONE, "protocol 6"),
    "text that is none": (b"X\x01\x00\x00\x00\xff", "a text or number cannot be read"),
    "number that is none": (b"Ione\n", "a text or number cannot be read"),
    "line without an end": (b"cos", "does not end|cannot be read|ends too early|names"),
    "control characters": (name("ldm.\x1b[31mred") + ARGS + b"R", r"it calls `ldm\.\\x1b\[31mred`"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_refused_by_its_form(place: Path, case: str) -> None:
    value, reason = CHAINS[case]
    assert re.search(reason, refusal(place, archive(mapping(w=tensor(), x=value))))


@pytest.mark.parametrize("header", ["magic", "protocol", "system", "object", "keys"])
def test_payload_in_every_pickle_of_the_old_format(place: Path, header: str) -> None:
    assert "`os.system`" in refusal(place, legacy(mapping(w=tensor()), **{header: program(SYSTEM + ARGS + b"R")}))


@pytest.mark.parametrize("member", ["sys_info", "pickle", "tensors", "storages"])
def test_payload_in_every_member_of_a_tar(place: Path, member: str) -> None:
    assert "`os.system`" in refusal(place, tarred(NONE, **{member: program(SYSTEM + ARGS + b"R")}))


@pytest.mark.parametrize("container", ["zip", "bare", "legacy"])
def test_payload_after_the_end(place: Path, container: str) -> None:
    content = CONTAINERS[container](EMPTY_DICT + STOP + PROTO2 + SYSTEM + ARGS + b"R")
    assert re.search("bytes follow the end of the pickle|`os.system`", refusal(place, content))


def test_payloads_are_real(place: Path) -> None:
    """Python's own pickle runs them: each leaves its marker in a folder of its own."""
    real = [
        "REDUCE", "STACK_GLOBAL", "STACK_GLOBAL of pieces in the memo", "GLOBAL of Python 2", "INST", "OBJ",
        "text protocol", "text protocol, tuple in the memo", "popped again", "behind a mark", "in the memo", "partial",
        "map in a list", "nested pickle", "as a key",
    ]  # fmt: skip
    for case in real:
        (place / case).mkdir()
        (place / case / "payload").write_bytes(b"\x80\x04" + FORMS[case] + STOP)
    code = "import os, pickle, sys\nfor d in sys.argv[1:]:\n os.chdir(d)\n try: pickle.load(open('payload', 'rb'))\n except Exception: pass"
    subprocess.run([sys.executable, "-c", code, *(place / case for case in real)], check=True, timeout=60)
    assert [case for case in real if not (place / case / "marker").exists()] == []
    for marker in place.rglob("marker"):
        marker.unlink()


# ---- more than it seems: time and memory


def nested(count: int) -> bytes:
    """Tuples of tuples, each twice in the next: 2^count leaves."""
    return several(number(1)) + b"".join(b"q\x01h\x01\x86" for _ in range(count))


def shared_dicts(count: int) -> bytes:
    """A state dict of dicts, each twice in the next: 2^count names."""
    level = b"(" + text("a") + b"h\x01" + text("b") + b"h\x01u"
    return mapping(w=tensor()) + b"".join(b"q\x010" + EMPTY_DICT + level for _ in range(count))


COLLIDING = b"".join(number(((1 << 61) - 1) * k) + NONE for k in range(1, 150_000))
BOMBS = {
    "hash of nested tuples": pairs((nested(60), NONE)),
    "hash in a set": MARK + nested(60) + b"\x91",
    "lists of lists": EMPTY_LIST + b"".join(b"q\x01(h\x01h\x01h\x01h\x01l" for _ in range(60)),
    "keys that collide": EMPTY_DICT + MARK + COLLIDING + b"u",
    "deep lists": EMPTY_LIST * 900_000 + b"a" * 899_999,
    "deep tuples": NONE + b"\x85" * 2_000_000,
    "deep objects": NONE + (b"\x85q\x01" + b"0cldm\nModel\nh\x01R") * 400_000,
    "marks": MARK * 2_900_000 + b"0" * 2_900_000 + NONE,
    "sets": b"\x8f" * 2_900_000,
    "dicts": EMPTY_DICT * 2_900_000,
    "too many instructions": b"N0" * 4_000_000 + NONE,
    "list in itself": EMPTY_LIST + b"q\x01h\x01a",
    "dict in itself": EMPTY_DICT + b"q\x01" + text("state_dict") + b"h\x01s",
    "text encoded again and again": b"X" + struct.pack("<I", 1 << 20) + b"\xc3\xa9" * (1 << 19) + b"q\x01"
    + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 4000 + b"0" * 4000,
    "dict copied again and again": EMPTY_LIST + b"(" + b"(K\x01K\x02l" * 50_000 + b"eq\x01"
    + b"ccollections\nOrderedDict\nh\x01\x85R" * 20_000 + b"0" * 20_000,
    "array of zeros": call("builtins.bytearray", number(1 << 40)),
    "storage of zeros": call("torch.FloatStorage", number(1 << 40)),
    "text of 2^60 bytes": b"\x8d" + struct.pack("<Q", 1 << 60) + b"x",
    "text of 2^32 bytes": b"X\xff\xff\xff\xffx",
    "bytes of 2^60 bytes": b"\x8e" + struct.pack("<Q", 1 << 60) + b"x",
    "bytearray of 2^60 bytes": b"\x96" + struct.pack("<Q", 1 << 60) + b"x",
    "frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 1 << 60) + NONE,
    "number of 2^31 bytes": b"\x8b" + struct.pack("<I", 1 << 31) + b"x",
    "number of a megabyte": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20),
    "number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "number of 60 thousand digits": b"L" + b"9" * 60_000 + b"L\n",
    "memo of 2^32": NONE + b"r\xff\xff\xff\xff",
    "lines": b"Vx\n0" * 1_400_000 + NONE,
    "80 MB of text": b"X" + struct.pack("<I", 80 << 20) + b"x" * (80 << 20),
    "parameters of parameters": tensor() + (b"q\x01" + b"0ctorch._utils\n_rebuild_parameter\nh\x01\x89\x89\x87R") * 200_000,
    "2^40 names": shared_dicts(40),
    "2^2000 names": shared_dicts(2000),
    "wrappers": b"".join(EMPTY_DICT + MARK + text("state_dict") for _ in range(100)) + mapping(w=tensor()) + b"u" * 100,
    "long names": mapping(**{"x" * 900: mapping(**{"y" * 900: tensor()})}),
    "a name of 10 MB": mapping(**{"x" * 10_000_000: tensor()}),
    "10^12 elements": mapping(w=tensor((10**6, 10**6), (0, 0))),
    "2^63 elements": mapping(w=tensor((1 << 62, 2), (0, 0))),
    "dimensions": mapping(w=tensor((1,) * 100_000, (1,) * 100_000)),
    "2^60 stored elements": mapping(w=tensor(store=storage(numel=1 << 60))),
    "numpy array of 2^40": mapping(w=call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), sizes(0), raw(b"b"))
    + several(number(1), sizes(1 << 40), call("numpy.dtype", text("f4")), b"\x89", raw(b"")) + b"b"),
}  # fmt: skip
READ = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from weightport.converters.torch_file import read_torch
from weightport.converters.errors import ConversionError
from pathlib import Path
start = time.perf_counter()
try:
    read_torch(Path(sys.argv[1]))
except ConversionError as error:
    print(error)
print(round(time.perf_counter() - start, 1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "MB", file=sys.stderr)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_time_and_memory_are_bounded(place: Path, bomb: str) -> None:
    """Refused, or read where it is only strange; in a process that may have 1 GB."""
    value = mapping(state_dict=mapping(w=tensor()), optimizer=BOMBS[bomb])
    for number, content in enumerate([archive(value), archive(BOMBS[bomb])]):
        path = written(place / f"{number}.ckpt", content)
        ran = subprocess.run(
            [sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=20, check=False
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert ran.stdout.count("\n") <= 1
        assert ran.stdout == "" or ran.stdout.startswith(f"{path}: ")
        path.unlink()
