"""Malicious and damaged PyTorch checkpoints: refused in one line, nothing executed, time and memory
bounded.

Every payload would leave a marker file if anything ran it; that many of them do is checked with
Python's own pickle, in a process of its own.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weightport.io.arrays  # noqa: F401  # else the first tensor that is read imports it
from weightport.converters.checkpoint import SourceFile
from weightport.converters.readers.signatures import is_torch
from weightport.converters.readers.torch_file import read_torch
from weightport.errors import ConversionError

from ..support.pickle_files import (
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

COMMAND = text("touch marker")
CODE = text("__import__('os').system('touch marker')")
FUNCTION = text("system")


@pytest.fixture(autouse=True)
def nothing_runs(place: Path) -> Iterator[None]:
    """No marker appears, and no module is imported."""
    modules = set(sys.modules)
    yield
    assert not list(place.rglob("marker"))
    assert {
        module for module in set(sys.modules) - modules if not module.startswith("encodings.")
    } == set()


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
    "ensurepip.bootstrap": b"", "site.execsitecustomize": b"", "sys.exit": b"", "sys.settrace": COMMAND,
    "gc.collect": b"", "operator.getitem": COMMAND,
    "atexit.register": name("os.system"), "signal.alarm": number(1), "zipimport.zipimporter": COMMAND,
    "zipfile.ZipFile": COMMAND, "tarfile.open": COMMAND, "sqlite3.connect": COMMAND, "mailcap.findmatch": COMMAND,
    "tkinter.Tcl": b"", "turtle.Screen": b"", "nturl2path.url2pathname": COMMAND, "ast.literal_eval": CODE,
    "typing.get_type_hints": CODE, "collections.namedtuple": CODE, "dataclasses.make_dataclass": CODE,
    "enum.unique": CODE, "_pyrepl.pager.pipe_pager": COMMAND, "asyncore.loop": b"", "string.templatelib.x": CODE,
    "test.support.script_helper.assert_python_ok": COMMAND, "unittest.mock._importer": COMMAND,
    # other packages: anything that is not a class
    "torch.load": COMMAND, "torch.storage._load_from_bytes": raw(b"."), "torch.hub.load": COMMAND,
    "torch.save": COMMAND,
    "torch.jit.load": COMMAND, "torch.serialization.load": COMMAND, "torch._utils.load": COMMAND,
    "torch.utils.cpp_extension.load_inline": COMMAND, "torch._dynamo.guards.eval": CODE, "torch.compile": CODE,
    "torch.jit.unsupported_tensor_ops.execWrapper": CODE, "torch.distributed.rpc.rpc_sync": COMMAND,
    "torch.utils.collect_env.run": COMMAND, "torch._inductor.codecache.compile_file": COMMAND,
    "numpy.testing._private.utils.runstring": CODE, "numpy.f2py.crackfortran.myeval": CODE, "numpy.load": COMMAND,
    "numpy.fromfile": COMMAND, "numpy.core.multiarray.fromfile": COMMAND,
    "numpy.distutils.exec_command.exec_command": COMMAND,
    "pip.main": COMMAND, "pip._internal.cli.main.main": COMMAND, "setuptools.setup": b"", "joblib.load": COMMAND,
    "dill.loads": raw(b"."), "cloudpickle.loads": raw(b"."), "pandas.read_pickle": COMMAND, "pandas.eval": CODE,
    "requests.get": COMMAND, "aiohttp.web.run_app": COMMAND, "tensorflow.io.write_file": COMMAND, "yaml.load": CODE,
    "tensorflow.keras.models.load_model": COMMAND, "keras.utils.get_file": COMMAND, "sympy.sympify": CODE,
    "transformers.pipeline": COMMAND, "ldm.util.instantiate_from_config": COMMAND, "__main__.run": COMMAND,
}  # fmt: skip
CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": archive,
    "legacy": legacy,
    "tar": tarred,
    "bare": program,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("called", CALLED)
def test_refused_by_the_name_it_calls(place: Path, called: str, container: str) -> None:
    value = mapping(optimizer=call(called, CALLED[called]))
    shown = called.replace("__builtin__", "builtins")
    assert re.fullmatch(
        f"it (names|calls) `{re.escape(shown)}`, which .*malicious",
        refusal(place, CONTAINERS[container](value)),
    )


# ---- ways to call

SYSTEM = name("os.system")
ARGS = several(COMMAND)
STACKED = b"\x8c\x02os\x8c\x06system\x93"
REBUILD = "torch._utils._rebuild_tensor_v2"
OBJECT = MARK + name("ldm.Model") + b"o"
FORMS = {
    "REDUCE": SYSTEM + ARGS + b"R",
    "STACK_GLOBAL": STACKED + ARGS + b"R",
    "STACK_GLOBAL of a path": b"\x8c\x0dtorch._dynamo\x8c\x09os.system\x93" + ARGS + b"R",
    "STACK_GLOBAL through a class": b"\x8c\x05torch\x8c\x20serialization.os.system.__call__\x93" + ARGS + b"R",
    "STACK_GLOBAL of pieces in the memo": b"\x8c\x06system\x94" + b"0\x8c\x02os\x94" + b"h\x00\x93" + ARGS + b"R",
    "GLOBAL of a path": name("torch.serialization:os.system") + ARGS + b"R",
    "class behind a module": name("torch.utils.cpp_extension:subprocess.Popen") + ARGS + b"R",
    "instance of a class behind a module": name("torch.utils.cpp_extension:subprocess.Popen") + ARGS + b"\x81",
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
    "class of a reconstructed object": call("copyreg._reconstructor", name("os._wrap_close"), NONE),
    "hooks of a tensor": call(REBUILD, storage(), number(0), sizes(4), sizes(1), NONE, SYSTEM),
    "function of a tensor type": call("torch._tensor._rebuild_from_type_v2", SYSTEM, name("torch.Tensor"), ARGS, NONE),
    "type of a storage": several(text("storage"), SYSTEM, text("0"), text("cpu"), number(4)) + b"Q",
    "persistent id": call(SYSTEM, COMMAND) + b"Q",
    "numpy object array": call("numpy.core.multiarray._reconstruct", SYSTEM, sizes(0), raw(b"b")),
    "member of an enumeration": call("builtins.getattr", SYSTEM, text("__call__")),
    "nested pickle": call("pickle.loads", raw(PROTO2 + SYSTEM + ARGS + b"R.")),
    "nested in bytes of a storage": call("torch.storage._load_from_bytes", raw(PROTO2 + SYSTEM + ARGS + b"R.")),
}  # fmt: skip
NAMED = re.compile(
    r"it (names|calls)"
    r" `(os\.(system|_wrap_close)|torch\._dynamo\.os\.system|torch\.serialization\.os\.system[._call]*|"
    r"builtins\.(eval|map)|pickle\.loads|torch\.storage\._load_from_bytes|torch\.utils\.cpp_extension\.subprocess\.Popen)`"
    r", which .*malicious"
)


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_refused_however_it_calls(place: Path, form: str, container: str) -> None:
    assert NAMED.fullmatch(
        refusal(place, CONTAINERS[container](mapping(w=tensor(), x=FORMS[form])))
    ), form


MEMBER = call("builtins.getattr", name("a.Kind"), text("x"))
CHAINS = {
    "getattr of a module": (call("builtins.getattr", text("os"), text("system")), r"`builtins\.getattr`"),
    "getattr of a result": (call("builtins.getattr", call("ldm.Model"), text("x")), r"`builtins\.getattr`"),
    "getattr of builtins": (call("builtins.getattr", name("builtins.dict"), text("get")), r"`builtins\.getattr`"),
    "getattr of a private name": (call("builtins.getattr", name("a.Model"), text("__init__")), r"`builtins\.getattr`"),
    "getattr of a function": (call("builtins.getattr", name("torch.load"), text("x")), r"`builtins\.getattr`"),
    "getattr of three": (call("builtins.getattr", name("a.Model"), text("x"), NONE), r"`builtins\.getattr`"),
    "getitem of os": (call("_operator.getitem", text("os"), text("system")), r"`_operator\.getitem`"),
    "getitem of a class": (call("_operator.getitem", name("a.Model"), text("x")), r"`_operator\.getitem`"),
    "call of an attribute": (call(MEMBER, COMMAND), r"what `builtins\.getattr` returns"),
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
    "empty stack": (b"0" * 9, "a value is missing"),
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
    "text without quotes": (b"Sxyx\n", "a text without quotes"),
    "text with one quote": (b"S'\n", "a text without quotes"),
    "text with other quotes": (b"S'x\"\n", "a text without quotes"),
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
    replaced: dict[str, Any] = {header: program(SYSTEM + ARGS + b"R")}
    assert "`os.system`" in refusal(place, legacy(mapping(w=tensor()), **replaced))


@pytest.mark.parametrize("member", ["sys_info", "pickle", "tensors", "storages"])
def test_payload_in_every_member_of_a_tar(place: Path, member: str) -> None:
    assert "`os.system`" in refusal(place, tarred(NONE, **{member: program(SYSTEM + ARGS + b"R")}))


UNPICKLE = """
import contextlib, os, pickle, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    with contextlib.suppress(Exception), open("payload", "rb") as file:
        pickle.load(file)
"""


@pytest.mark.parametrize("container", ["zip", "bare", "legacy"])
def test_payload_after_the_end(place: Path, container: str) -> None:
    content = CONTAINERS[container](EMPTY_DICT + STOP + PROTO2 + SYSTEM + ARGS + b"R")
    assert re.search("bytes follow the end of the pickle|`os.system`", refusal(place, content))


def test_payloads_are_real(place: Path) -> None:
    """Python's own pickle runs them: each leaves its marker in a folder of its own."""
    real = [
        "REDUCE", "STACK_GLOBAL", "STACK_GLOBAL of pieces in the memo", "INST", "OBJ",
        "text protocol", "text protocol, tuple in the memo", "popped again", "behind a mark", "in the memo", "partial",
        "map in a list", "nested pickle", "as a key",
    ]  # fmt: skip
    for case in real:
        (place / case).mkdir()
        (place / case / "payload").write_bytes(b"\x80\x04" + FORMS[case] + STOP)
    subprocess.run(
        [sys.executable, "-c", UNPICKLE, *(place / case for case in real)], check=True, timeout=60
    )
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


def many(count: int, value: bytes) -> bytes:
    """A dict of one value under many keys."""
    return pairs(*((text(str(number)), value) for number in range(count)))


def repeated(state: bytes) -> bytes:
    """A dict of one module under many names."""
    return mapping(w=tensor(), m=call("ldm.Model") + state + b"bq\x01", n=many(50_000, b"h\x01"))


def beside_weights(value: bytes, count: int) -> bytes:
    """A trainer's save with a value under many names beside the weights."""
    names = b"".join(text(f"b{i}") + b"h\x05" for i in range(count))
    first = text("b") + value + b"q\x05"
    state = text("state_dict") + mapping(w=tensor())
    return EMPTY_DICT + MARK + state + first + names + b"u"


ENDLESS = call("ldm.Model") + b"q\x01" + mapping(_modules=mapping(m=b"h\x01")) + b"b"
TRANSIENT = {
    "_non_persistent_buffers_set": call("builtins.set", EMPTY_LIST + MARK + text("a") * 1000 + b"e")
}


def array_beside(state: bytes) -> bytes:
    """A numpy array beside a tensor."""
    made = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), sizes(0), raw(b"b"))
    return mapping(v=tensor(), w=made + state + b"b")


PARAMETER = name("torch._utils._rebuild_parameter")
FLOAT32 = call("numpy.dtype", text("f4")) + several(number(3), text("<")) + b"b"
OBJECTS = call("numpy.dtype", text("O8")) + several(number(3), text("|")) + b"b"
COLLIDING = b"".join(number(((1 << 61) - 1) * k) + NONE for k in range(1, 150_000))
BOMBS = {
    "hash of nested tuples": pairs((nested(60), NONE)),
    "hash in a set": MARK + nested(60) + b"\x91",
    "lists of lists": EMPTY_LIST + b"".join(b"q\x01(h\x01h\x01h\x01h\x01l" for _ in range(60)),
    "keys that collide": EMPTY_DICT + MARK + COLLIDING + b"u",
    "deep lists": EMPTY_LIST * 300_000 + b"a" * 299_999,
    "deep tuples": NONE + b"\x85" * 500_000,
    "deep objects": NONE + (b"\x85q\x01" + b"0cldm\nModel\nh\x01R") * 100_000,
    "marks": MARK * 300_000 + b"0" * 300_000 + NONE,
    "sets": MARK + b"\x8f" * 900_000 + b"t",
    "too many instructions": b"N0" * 1_500_000 + NONE,
    "many numbers": MARK + b"M\xff\xff" * 2_900_000 + b"t",
    "many dicts": MARK + EMPTY_DICT * 2_900_000 + b"t",
    "many small dicts": MARK + b"}NNs" * 725_000 + b"t",
    "much in the memo": NONE + b"\x94" * 2_900_000,
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
    "name of 60 kB": name("ldm." + "M" * 60_000),
    "memo of 2^32": NONE + b"r\xff\xff\xff\xff",
    "lines": b"Vx\n0" * 300_000 + NONE,
    "80 MB of text": b"X" + struct.pack("<I", 80 << 20) + b"x" * (80 << 20),
}  # fmt: skip
BOMBS_AS_WEIGHTS = {
    "parameters of parameters": mapping(w=tensor() + (b"q\x010" + PARAMETER + b"h\x01\x89\x89\x87R") * 50_000),
    "2^40 names": shared_dicts(40),
    "2^2000 names": shared_dicts(2000),
    "wrappers": b"".join(EMPTY_DICT + MARK + text("state_dict") for _ in range(100)) + mapping(w=tensor()) + b"u" * 100,
    "one dict under many names": beside_weights(mapping(**{f"k{i}": NONE for i in range(90_000)}), 50_000),
    "wrapper in itself": EMPTY_DICT + b"q\x01" + text("state_dict") + b"h\x01s" + text("w") + tensor() + b"s",
    "module in itself": mapping(w=tensor(), m=ENDLESS),
    "module without parameters": repeated(mapping(_parameters=many(50_000, NONE), _modules=EMPTY_DICT)),
    "module with transient buffers": repeated(mapping(_buffers=many(9, NONE), _modules=EMPTY_DICT, **TRANSIENT)),
    "scalars": mapping(w=tensor(), a=text("x" * 1_000_000) + b"q\x01", b=many(50_000, b"h\x01")),
    "long names": mapping(**{"x" * 900: mapping(**{"y" * 900: tensor()})}),
    "a name of 10 MB": mapping(**{"x" * 10_000_000: tensor()}),
    "10^12 elements": mapping(w=tensor((10**6, 10**6), (0, 0))),
    "2^63 elements": mapping(w=tensor((1 << 62, 2), (0, 0))),
    "dimensions": mapping(w=tensor((1,) * 100_000, (1,) * 100_000)),
    "2^60 stored elements": mapping(w=tensor(store=storage(numel=1 << 60))),
    "numpy array of 2^40": array_beside(several(number(1), sizes(1 << 40), FLOAT32, b"\x89", raw(b""))),
    "numpy array of objects": array_beside(several(number(1), sizes(1), OBJECTS, b"\x89", EMPTY_LIST)),
}  # fmt: skip
READ = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from pathlib import Path
from weightport.errors import ConversionError
from weightport.converters.readers.torch_file import read_torch
for path in sys.argv[1:]:
    start, line = time.process_time(), ""
    try:
        read_torch(Path(path))
    except ConversionError as error:
        line = str(error).removeprefix(f"{path}: ")
    print(json.dumps([path, line, time.process_time() - start]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """Bomb -> what the reader said, and after how many seconds; in a process that may have 1 GB of
    addresses."""
    folder = tmp_path_factory.mktemp("bombs")
    values = {
        bomb: mapping(state_dict=mapping(w=tensor()), optimizer=value)
        for bomb, value in BOMBS.items()
    }
    paths = {
        str(written(folder / f"{number}.ckpt", archive(value))): bomb
        for number, (bomb, value) in enumerate((values | BOMBS_AS_WEIGHTS).items())
    }
    ran = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = {
        paths[path]: (line, seconds)
        for path, line, seconds in map(json.loads, ran.stdout.splitlines())
    }
    shutil.rmtree(folder)
    assert len(said) == len(paths), ran.stderr[-2000:]
    return said


SAID = {  # of the others, nothing: they are beside the weights, and strange, but not large
    "too many instructions": "more than 3000000 instructions",
    "80 MB of text": "more than 64 MiB",
    "text of 2^60 bytes": "ends too early",
    "text of 2^32 bytes": "ends too early",
    "bytes of 2^60 bytes": "ends too early",
    "bytearray of 2^60 bytes": "ends too early",
    "frame of 2^60 bytes": "ends too early",
    "number of 2^31 bytes": "ends too early",
    "number of a megabyte": "a number of 1048576 bytes",
    "number of a million digits": "a line does not end",
    "number of 60 thousand digits": "a number of 60001 digits",
    "name of 60 kB": "a name in it is too long",
    "memo of 2^32": "a number in its memo is too large",
    "parameters of parameters": (
        "`w` is a tensor made by `torch._utils._rebuild_parameter`, which is not supported"
    ),
    "2^40 names": "more than 150000 entries",
    "2^2000 names": "too long or too deep",
    "wrappers": "too long or too deep",
    "one dict under many names": "more than 150000 entries",
    "wrapper in itself": "too long or too deep",
    "module in itself": "too long or too deep",
    "module without parameters": "more than 150000 entries",
    "module with transient buffers": "too many buffers that are not saved",
    "long names": "too long or too deep",
    "a name of 10 MB": "too long or too deep",
    "10^12 elements": "`w` has 1000000000000 elements, more than its storage",
    "2^63 elements": "`w` has 9223372036854775808 elements, more than its storage",
    "dimensions": "`w` is no list of sizes",
    "2^60 stored elements": "storage `0` has 16 bytes, its tensors need 4611686018427387904",
    "numpy array of 2^40": "`w` is a numpy array of a kind that is not supported",
    "numpy array of objects": "`w` is a numpy array of a kind that is not supported",
}


@pytest.mark.parametrize("bomb", [*BOMBS, *BOMBS_AS_WEIGHTS])
def test_time_and_memory_are_bounded(outcomes: dict[str, tuple[str, float]], bomb: str) -> None:
    """Refused, or read where it is only strange and left alone."""
    line, seconds = outcomes[bomb]
    assert seconds < 15
    assert line.isprintable()
    assert len(line) < 600
    assert re.search(SAID.get(bomb, "^$"), line)


def patched(content: bytes, marker: bytes, offset: int, data: bytes, last: bool = True) -> bytes:
    """Overwrite bytes at a distance from where something is found, last or first."""
    at = (content.rfind(marker) if last else content.find(marker)) + offset
    return content[:at] + data + content[at + len(data) :]


# ---- data that is not where the pickle says


def one(value: bytes, **storages: bytes) -> bytes:
    """A pickle of one tensor `w`, with storages."""
    return archive(
        mapping(w=value), {key.lstrip("_"): data for key, data in storages.items()} or None
    )


ENDS = [number(0), sizes(4), sizes(1), NONE, NONE]  # of the arguments of a tensor
TWO_TYPES = mapping(v=tensor(), w=tensor(store=storage(kind="torch.IntStorage")))
TWO_SIZES = mapping(v=tensor(), w=tensor(store=storage(numel=3)))
NO_STORE = mapping(v=tensor(), w=tensor(store=text("0")))
ODD_ARRAY = "`w` is a numpy array of a kind that is not supported"


def ordered(*entries: bytes) -> bytes:
    """An ordered dict as Python 2 writes it."""
    return call("collections.OrderedDict", EMPTY_LIST + MARK + b"".join(entries) + b"e")


def array_of(dtype: bytes, data: bytes) -> bytes:
    return archive(array_beside(several(number(1), sizes(1), dtype, b"\x89", data)))


PLAIN = several(storage(), *ENDS)
ODD = call("torch._tensor._rebuild_from_type_v2", name(REBUILD), name("a.Odd"), PLAIN, NONE)
V3 = call(
    "torch._utils._rebuild_tensor_v3", storage(), *ENDS, name("torch.float32"), mapping(neg=b"\x88")
)
DATA = {
    "storage is missing": (one(tensor(store=storage("7")), _0=FOUR), "missing|belongs to no tensor"),
    "no storages": (zipped([("m/data.pkl", program(mapping(w=tensor())))]), "1 storages are missing"),
    "storage is short": (one(tensor(), _0=FOUR[:-1]), "has 15 bytes, its tensors need 16"),
    "storage is long": (one(tensor(), _0=FOUR + b"x"), "has 17 bytes, its tensors need 16"),
    "storage is empty": (one(tensor(), _0=b""), "has 0 bytes"),
    "storage is not used": (one(tensor(), _0=FOUR, _1=FOUR), "`1` belongs to no tensor"),
    "storage of two types": (archive(TWO_TYPES), "two ways"),
    "storage of two sizes": (archive(TWO_SIZES), "two ways"),
    "storage of no type": (one(tensor(store=storage(kind="torch.OddStorage"))), "none that PyTorch knows"),
    "storage of another module": (one(tensor(store=storage(kind="evil.FloatStorage"))), "none that PyTorch knows"),
    "storage that leads elsewhere": (one(tensor(store=storage("../../0"))), "none that PyTorch knows"),
    "storage of less than nothing": (one(tensor(store=storage(numel=-4))), "none that PyTorch knows"),
    "reference of another form": (one(text("0") + b"Q"), "form that PyTorch never writes"),
    "reference with more": (one(several(text("storage"), *[NONE] * 6) + b"Q"), "form that PyTorch never writes"),
    "tensor too long": (one(tensor((5,))), "`w` reaches outside"),
    "tensor too far": (one(tensor(offset=1)), "`w` reaches outside"),
    "tensor too wide": (one(tensor((2,), (4,))), "`w` reaches outside"),
    "tensor before its storage": (one(tensor(offset=-1)), "no list of sizes"),
    "tensor backwards": (one(tensor(stride=(-1,), offset=3)), "no list of sizes"),
    "tensor of negative size": (one(tensor((-4,))), "no list of sizes"),
    "tensor of text": (one(call(REBUILD, storage(), text("0"), sizes(4), sizes(1), NONE, NONE)), "no list of sizes"),
    "tensor of truth": (one(call(REBUILD, storage(), b"\x89", sizes(4), sizes(1), NONE, NONE)), "no list of sizes"),
    "tensor of other rank": (one(tensor((2, 2), (1,))), "`w` reaches outside"),
    "tensor without storage": (archive(NO_STORE), "`w` is a tensor made by .* not supported"),
    "tensor conjugated": (one(call(REBUILD, storage(), *ENDS, mapping(conj=b"\x88"))), "not supported"),
    "tensor negated": (one(V3), "`w` is a tensor made by `torch._utils._rebuild_tensor_v3`, which is not supported"),
    "tensor of an odd class": (archive(mapping(v=tensor(), w=ODD)), "not supported"),
    "tensor twice": (archive(mapping(**{"a.b": tensor(), "a": mapping(b=tensor())})), r"`a\.b` is there twice"),
    "name of control characters": (archive(mapping(**{"w\x1b[31m": tensor()})), r"`w\\x1b\[31m` holds control"),
    "name with a line feed": (archive(mapping(**{"a\nb": tensor()})), r"`a\\x0ab` holds control"),
    "name with NUL": (archive(mapping(**{"a\0b": tensor()})), r"`a\\x00b` holds control"),
    "name of a lone surrogate": (archive(mapping(**{"a\ud800": tensor()})), "holds control"),
    "name right to left": (archive(mapping(**{"a\u202eb": tensor()})), "holds control"),
    "nothing": (archive(EMPTY_DICT), "no named tensors in it, but a dict|belongs to no"),
    "only a tensor": (archive(tensor()), "no named tensors in it, but a tensor"),
    "pairs of one": (program(ordered(several(text("a")))), "an ordered dict in it is damaged"),
    "pairs of three": (program(ordered(several(text("a"), NONE, NONE))), "an ordered dict in it is damaged"),
    "pairs that are none": (program(ordered(text("ab"))), "an ordered dict in it is damaged"),
    "pairs of numbers": (program(ordered(several(number(1), NONE))), "an ordered dict in it is damaged"),
    "pairs twice": (program(ordered(*[several(text("a"), NONE)] * 2)), "an ordered dict in it is damaged"),
    "numpy array of objects": (array_of(OBJECTS, raw(b"12345678")), ODD_ARRAY),
    "numpy array of no bytes": (array_of(FLOAT32, EMPTY_LIST), ODD_ARRAY),
    "numpy array of other text": (array_of(FLOAT32, text("\u1234")), ODD_ARRAY),
    "a value left over": (program(NONE + NONE), "values are left over"),
    "a mark left over": (program(MARK + NONE), "values are left over"),
    "only a number": (program(number(5)), "no named tensors in it, but a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data_that_does_not_fit_is_refused(place: Path, case: str) -> None:
    content, reason = DATA[case]
    assert re.search(reason, refusal(place, content))


def backwards() -> bytes:
    """A tar whose member has a negative size, so that the next one would be the same again."""
    header = bytearray(tarfile.TarInfo("pickle").tobuf())
    header[124:136], header[148:156] = b"-0000001000\0", b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tarred(NONE)


def part(first: int, numel: int) -> bytes:
    """A view of a storage, as it was written before torch 0.4."""
    view = several(text("1"), number(first), number(numel))
    return (
        several(
            text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4), view
        )
        + b"Q"
    )


BIG = {"protocol_version": 1001, "little_endian": False}
RANKED = pickle.dumps(1, 2) + program(several(number(7), number(5), name("torch.FloatTensor")))
OLD = {
    "big-endian": (legacy(mapping(w=tensor()), system=pickle.dumps(BIG, 2)), "big-endian"),
    "no system": (legacy(mapping(w=tensor()), system=pickle.dumps(None, 2)), "big-endian"),
    "another version": (legacy(mapping(w=tensor()), protocol=pickle.dumps(1002, 2)), "version of its format"),
    "storage not listed": (legacy(mapping(w=tensor()), {}), "1 storages are missing"),
    "storage not listed but there": (legacy(mapping(w=tensor()), keys=pickle.dumps([], 2)), "end at byte"),
    "storage listed twice": (
        legacy(mapping(w=tensor()), keys=pickle.dumps(["0", "0"], 2)) + struct.pack("<q", 4) + FOUR, "there twice"),
    "storage of no tensor": (legacy(mapping(w=tensor()), {"0": FOUR, "1": FOUR}), "`1` belongs to no tensor"),
    "storage cut": (legacy(mapping(w=tensor()))[:-1], "truncated"),
    "storage without a length": (legacy(mapping(w=tensor()))[:-20], "truncated"),
    "storage shorter": (legacy(mapping(w=tensor()), {"0": FOUR[:8]}), "has 8 bytes, its tensors need 16"),
    "storage with more after": (legacy(mapping(w=tensor())) + b"x", "end at byte"),
    "list of numbers": (legacy(mapping(w=tensor()), keys=pickle.dumps([0], 2)), "list of storages is damaged"),
    "list of nests": (legacy(mapping(w=tensor()), keys=program(EMPTY_LIST + nested(60) + b"a")), "list of storages"),
    "no list": (legacy(mapping(w=tensor()), keys=pickle.dumps("0", 2)), "list of storages is damaged"),
    "view before": (legacy(mapping(w=tensor(store=part(-1, 1)))), "a view of storage `0` reaches outside"),
    "view of less than nothing": (legacy(mapping(w=tensor(store=part(1, -1)))), "a view of storage `0` reaches"),
    "view outside": (legacy(mapping(w=tensor(store=part(2, 3)))), "a view of storage `0` reaches outside"),
    "cut in a header": (legacy(mapping(w=tensor()))[:20], "ends too early"),
    "tar cut": (tarred(mapping(w=text("7") + b"Q")).rstrip(b"\0")[:-3], "the tar archive is truncated"),
    "tar of another checksum": (patched(tarred(NONE), b"storages", 9, b"x"), "does not match its checksum"),
    "tar backwards": (backwards(), "does not match its checksum"),
    "tar of a reference to nothing": (tarred(mapping(w=text("8") + b"Q")), "leads nowhere"),
    "tar big-endian": (tarred(mapping(w=text("7") + b"Q"), sys_info=pickle.dumps(BIG, 2)), "big-endian"),
    "tar with one member more": (tarred(mapping(w=text("7") + b"Q"), evil=b"x"), "a tar archive of evil"),
    "tar of a million tensors": (tarred(NONE, tensors=pickle.dumps(1 << 40, 2)), "a count in it is damaged"),
    "tar of a text of tensors": (tarred(NONE, tensors=pickle.dumps("x", 2)), "a count in it is damaged"),
    "tar of 65 ranks": (tarred(NONE, tensors=RANKED + struct.pack("<ii131q", 65, 0, *[1] * 131)), "list of tensors"),
    "tar of 2^32 ranks": (tarred(NONE, tensors=RANKED + b"\xff" * 4000), "list of tensors is damaged"),
    "tar of a view of nothing": (
        tarred(NONE, storages=pickle.dumps(0, 2) + pickle.dumps([(1, 9, 0, 1)], 2)), "list of views is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD)
def test_old_formats_that_do_not_fit_are_refused(place: Path, case: str) -> None:
    content, reason = OLD[case]
    assert re.search(reason, refusal(place, content))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_tar_with_special_files(place: Path, kind: bytes) -> None:
    content = tarred(NONE, storages=b"")
    link = tarfile.TarInfo("storages2")
    link.type, link.linkname = kind, "/etc/hostname"
    assert "a link or a special file" in refusal(place, link.tobuf() + content)


def test_tar_that_renames(place: Path) -> None:
    long = tarfile.TarInfo("pickle/" + "x" * 200).tobuf(tarfile.PAX_FORMAT)
    assert "renames or resizes a member" in refusal(place, long + tarred(NONE))


def test_tar_with_long_records(place: Path) -> None:
    info = tarfile.TarInfo("pickle")
    info.pax_headers = {"comment": "x" * 1000}
    assert "renames or resizes a member" in refusal(
        place, info.tobuf(tarfile.PAX_FORMAT) + tarred(NONE)
    )


def test_tar_with_a_member_twice(place: Path) -> None:
    assert "`pickle` twice" in refusal(place, tarfile.TarInfo("pickle").tobuf() + tarred(NONE))


# ---- zip archives

PICKLE = ("m/data.pkl", program(mapping(w=tensor())))
STORE = ("m/data/0", FOUR)
ZIPS = {
    "pickle twice": ([PICKLE, STORE, ("m/data.pkl", program(NONE))], "`m/data.pkl` twice"),
    "storage twice": ([PICKLE, STORE, STORE], "`m/data/0` twice"),
    "two roots": ([PICKLE, STORE, ("n/data.pkl", PICKLE[1])], "2 folders at its top"),
    "no folder": ([("data.pkl", PICKLE[1]), ("data/0", FOUR)], "2 folders at its top"),
    "member up": ([PICKLE, STORE, ("m/../../escaped", b"x")], "not a plain name"),
    "member at the root": ([PICKLE, STORE, ("/etc/escaped", b"x")], "not a plain name"),
    "member with backslashes": ([PICKLE, STORE, ("m\\..\\escaped", b"x")], "not a plain name"),
    "member with a line feed": ([PICKLE, STORE, ("m/a\nb", b"x")], "not a plain name"),
    "folder": ([PICKLE, STORE, ("m/data/", b"")], "not a plain name"),
    "TorchScript with code only": ([PICKLE, STORE, ("m/code/__torch__.py", b"x")], "TorchScript"),
    "stranger": ([PICKLE, STORE, ("m/setup.py", b"x")], "`setup.py`, which PyTorch never writes"),
    "TorchScript": ([PICKLE, STORE, ("m/code/__torch__.py", b"x"), ("m/constants.pkl", b"x")], "TorchScript"),
    "TorchScript without code": ([PICKLE, STORE, ("m/constants.pkl", b"x")], "TorchScript"),
    "big-endian": ([PICKLE, STORE, ("m/byteorder", b"big")], "big-endian"),
    "no pickle": ([STORE], "without `data.pkl`"),
    "nothing": ([], "not a PyTorch|folders|damaged|bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_that_is_ambiguous_is_refused(place: Path, case: str) -> None:
    members, reason = ZIPS[case]
    assert re.search(reason, refusal(place, zipped(members)))


def test_zip_that_is_compressed(place: Path) -> None:
    bomb = [("m/data.pkl", program(b"N0" * 1_000_000 + NONE)), ("m/data/0", bytes(1 << 24))]
    assert "compressed or encrypted" in refusal(place, zipped(bomb, zipfile.ZIP_DEFLATED))


# Offsets in an entry of the directory, counted from the name behind it (46) or its start: PKWARE
# APPNOTE 4.3.12
GOOD = zipped([PICKLE, STORE])
LARGER = b"\x40\0\0\0" * 2
WHERE, END = b"m/data/0", b"PK\x05\x06"
PATCHES = {
    "encrypted": (patched(GOOD, WHERE, 8 - 46, b"\1"), "encrypted"),
    "compressed": (patched(GOOD, WHERE, 10 - 46, b"\x08"), "compressed"),
    "larger": (patched(GOOD, WHERE, 24 - 46, b"\x11"), "compressed"),
    "of both sizes larger": (patched(GOOD, WHERE, 20 - 46, b"\xff\0\0\0" * 2), "disagree|truncated"),
    "of 4 GB": (patched(GOOD, WHERE, 20 - 46, b"\xfe\xff\xff\xff" * 2), "disagree|truncated"),
    "of 2^64 bytes": (patched(GOOD, WHERE, 20 - 46, b"\xff\xff\xff\xff" * 2), "directory is cut"),
    "elsewhere": (patched(GOOD, WHERE, 42 - 46, b"\x07\0\0\0"), "disagree"),
    "over another": (patched(GOOD, WHERE, 42 - 46, b"\0\0\0\0"), "disagree"),
    "behind the end": (patched(GOOD, WHERE, 42 - 46, b"\0\0\0\x7f"), "truncated"),
    "of another name in the directory": (patched(GOOD, WHERE, 0, b"m/data/1"), "disagree"),
    "of another name in place": (patched(GOOD, WHERE, 0, b"m/data/1", last=False), "disagree"),
    "of no name": (patched(GOOD, WHERE, 0, b"\xff\xfe"), "no text"),
    "of another checksum": (patched(GOOD, b"m/data.pkl", 16 - 46, b"\1\2\3\4"), "checksum"),
    "something before": (zipped([PICKLE, STORE], before=b"PK\3\4" * 9), "does not begin the file"),
    "into the directory": (patched(patched(GOOD, WHERE, 20 - 46, LARGER), WHERE, -12, LARGER, last=False), "reaches"),
    "more members": (patched(GOOD, END, 10, b"\3\0"), "directory"),
    "fewer members": (patched(GOOD, END, 10, b"\1\0"), "more entries than it says"),
    "65535 members": (patched(GOOD, END, 10, b"\xff\xff"), "directory"),
    "directory elsewhere": (patched(GOOD, END, 16, b"\1\0\0\0"), "not where it should be"),
    "directory of 4 GB": (patched(GOOD, END, 12, b"\xff\xff\xff\x7f"), "not where it should be"),
    "on a second disk": (patched(GOOD, END, 6, b"\1\0"), "not where it should be"),
    "other flags in place": (patched(GOOD, WHERE, -24, b"\2", last=False), "disagree"),
    "other method in place": (patched(GOOD, WHERE, -22, b"\x08", last=False), "disagree"),
    "other size in place": (patched(GOOD, WHERE, -8, b"\x11", last=False), "disagree about its size"),
    "no entry": (patched(GOOD, WHERE, -46, b"XX"), "its directory is no directory"),
    "a long name": (patched(GOOD, WHERE, 28 - 46, b"\xff\xff"), "no text|directory|disagree"),
    "second disk": (patched(GOOD, END, 4, b"\1\0"), "not where it should be"),
    "comment": (patched(GOOD, END, 20, b"\5\0"), "not where it should be"),
    "bytes after": (GOOD + b"x" * 9, "not where it should be"),
    "cut": (GOOD[:-40], "directory is missing"),
    "cut in the middle": (GOOD[:100], "directory is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", PATCHES)
def test_zip_that_disagrees_with_itself_is_refused(place: Path, case: str) -> None:
    content, reason = PATCHES[case]
    assert re.search(reason, refusal(place, content))


@pytest.mark.parametrize(("offset", "data"), [(0, b"XX"), (-56, b"XX"), (16, b"\2"), (8, b"\0\0")])
def test_zip_with_a_damaged_64_bit_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, offset: int, data: bytes
) -> None:
    """Offsets from the locator; -56: the end record, 8: where it should be, 16: number of disks."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 4)
    damaged = patched(zipped([PICKLE, STORE]), b"PK\x06\x07", offset, data)
    assert "damaged zip archive" in refusal(place, damaged)


def test_zip_with_a_huge_directory(place: Path) -> None:
    path = written(place / "model.ckpt", b"PK\3\4")
    size = (64 << 20) + 1
    with path.open("r+b") as file:
        file.seek(4 + size)
        file.write(END + struct.pack("<4H2IH", 0, 0, 0, 0, size, 4, 0))
    with pytest.raises(
        ConversionError, match="the directory of the zip archive has 67108865 bytes"
    ):
        read_torch(path)


def test_zip_whose_members_overlap(place: Path) -> None:
    """One member lies in the bytes of another, complete with its header."""
    inner = zipped([STORE])
    whole = zipped([PICKLE, ("m/data/1", inner), STORE])
    at = struct.pack("<I", whole.find(inner))
    assert "overlaps another member" in refusal(place, patched(whole, WHERE, 42 - 46, at))


# ---- mutations


def samples() -> list[bytes]:
    state = mapping(
        state_dict=mapping(w=tensor((2, 2), (1, 2)), v=tensor()),
        step=number(5),
        x=call("ldm.Model"),
    )
    return [archive(state), legacy(state), tarred(mapping(w=text("7") + b"Q"))]


def mutated(chance: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randrange(1, 20)]
            case 3:
                data[at:at] = chance.choice(
                    [data[at : at + 30], bytes(chance.randrange(256) for _ in range(4))]
                )
        if not data:
            return b"\x80"
    return bytes(data)


def outcome(path: Path) -> str:
    """Read everything; the refusal, if there is one."""
    try:
        is_torch(SourceFile(path))
        for value in read_torch(path).tensors.values():
            value.numpy()
    except ConversionError as error:
        return str(error)
    return ""


def test_mutations_are_read_or_refused(place: Path) -> None:
    """Nothing but a refusal escapes, even when the tensors are read."""
    chance, contents, path = random.Random(7), samples(), place / "model.ckpt"
    end, count, refused = time.monotonic() + 4, 0, 0
    while time.monotonic() < end:
        path.write_bytes(mutated(chance, contents[count % len(contents)]))
        line = outcome(path)
        assert line == "" or line.startswith(f"{path}: ")
        assert line.isprintable()
        count, refused = count + 1, refused + (line != "")
    assert count > 500
    assert 0 < refused < count
