"""Files that name jobs: what they may say, and how others are refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import weightport
from weightport.batch.jobs import Job, Steps, placed
from weightport.batch.lists import MAX_JOBS, read_list
from weightport.converters.settings import Settings, options
from weightport.errors import ConversionError

from ..support.command import assert_refused, run

SCHEMA = Path(weightport.__file__).parent / "io" / "schemas" / "job.toml"


def jobs(path: Path, **common: object) -> list[Job]:
    """The jobs of a file, with places below `/results`."""
    return placed(read_list(path), Path("/results"), common, "1")


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


SAME = {
    "jobs.toml": """
[[job]]
sources = ["a/unet.h5", "hub:org/name/te.h5"]
output = "cat"
dtype = "float16"
max-shard-size = "2GB"
placeholder-token = ["<cat>=2"]
no-hash = true
[[job]]
sources = "/b.ckpt"
to = "ldm"
merge = [0.5, 0.25]
lora = ["x.safetensors@0.8", "hub:org/style/y.safetensors"]
""",
    "jobs.jsonl": """# two of them
{"sources": ["a/unet.h5", "hub:org/name/te.h5"], "output": "cat", "dtype": "float16", \
"max_shard_size": "2GB", "placeholder_tokens": ["<cat>=2"], "hashes": false}

{"sources": "/b.ckpt", "to": "ldm", "merge": [0.5, 0.25], \
"lora": ["x.safetensors@0.8", "hub:org/style/y.safetensors"]}
""",
    "jobs.csv": """sources,output,dtype,max-shard-size,placeholder-token,no-hash,to,merge,lora
a/unet.h5; hub:org/name/te.h5,cat,float16,2GB,<cat>=2,yes,,,
/b.ckpt,,,,,,ldm,"0.5,0.25",x.safetensors@0.8;hub:org/style/y.safetensors
""",
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_jobs_in_every_format(name: str, tmp_path: Path) -> None:
    first, second = jobs(written(tmp_path, name, SAME[name]), dtype="float32", ema=True)
    assert first.sources == (str(tmp_path / "a/unet.h5"), "hub:org/name/te.h5")
    assert (first.name, first.output, first.target) == ("cat", "cat", Path("/results/cat"))
    assert first.options == {
        "dtype": "float16",  # an entry's own goes before
        "ema": True,
        "max_shard_size": "2GB",
        "placeholder_tokens": ("<cat>=2",),
        "hashes": False,
    }
    assert (second.name, second.output) == ("b", "b.safetensors")
    assert second.options["lora"] == (
        str(tmp_path / "x.safetensors@0.8"),
        "hub:org/style/y.safetensors",
    )
    assert second.options["merge"] == (0.5, 0.25)


def test_lists_of_hub_ids(tmp_path: Path) -> None:
    text = "# mine\nhub:org/one\norg/two@v1.0\n\nhub:org/three/a/unet.h5\nother/one\n"
    found = {job.name: job.sources for job in jobs(written(tmp_path, "ids.txt", text))}
    assert found == {
        "org--one": ("hub:org/one",),
        "two": ("hub:org/two@v1.0",),
        "unet": ("hub:org/three/a/unet.h5",),
        "other--one": ("hub:other/one",),
    }


def test_every_option_has_a_place() -> None:
    fields = tomllib.loads(SCHEMA.read_text())["properties"].keys()
    assert fields == {"sources", "output", *options(Settings), *options(Steps)} - {"dry_run"}


HOSTILE: list[tuple[str, str | bytes, str]] = [
    ("a.toml", "x = [", "the TOML in it cannot be read"),
    ("a.toml", b"\xff\xfe", "not UTF-8 at byte 0"),
    ("a.toml", "a = " + "[" * 5000 + "]" * 5000, "nested too deeply|unknown|not known"),
    ("a.toml", "a" + ".a" * 100_000 + " = 1", "a key of many parts"),
    ("a.toml", "[" + "'a' . " * 100_000 + "a]", "a key of many parts"),
    ("a.toml", 'a = {"\\""' + '."\\""' * 100_000 + " = 1}", "a key of many parts"),
    ("a.toml", "[job]\nsources = 'x'", r"each job is a table \[\[job\]\]"),
    ("a.toml", "job = 1", r"each job is a table \[\[job\]\]"),
    ("a.toml", "[[task]]\nsources = 'x'", "`task` is not known"),
    ("a.toml", "[[job]]\nsources = []", "job 1: `sources` must contain at least 1"),
    ("a.toml", "[[job]]\nsources = 'x'\n[[job]]\nsource = 'x'", "job 2: it must"),
    ("a.toml", "[[job]]\nsources = 'x'\ndtype = 2020-01-01", "job 1: `dtype` must be string"),
    ("a.toml", "[[job]]\nsources = 'x'\nema = 'yes'", "job 1: `ema` must be boolean"),
    ("a.toml", '[[job]]\nsources = ["a\\u0000b"]', "job 1: `sources.0` must match"),
    ("a.toml", "[[job]]\nsources = 'x'\ndry_run = true", "job 1: it must not contain"),
    ("a.toml", "[[job]]\nsources = 'x'\nno-hash = true\nhashes = true", "`hashes` is said twice"),
    ("a.toml", "[[job]]\nsources = 'x'\n__class__ = 'x'", "job 1: it must not contain"),
    ("a.toml", "", "names no job"),
    ("a.toml", "#" * (9 << 20), "at most 8388608 are read"),
    ("a.jsonl", "{}", "line 1: it must contain"),
    ("a.jsonl", '{"sources": "x"}\n[1]', "line 2: the JSON in it is not an object"),
    ("a.jsonl", '{"sources": "x"}\n{"sources": "x",}', "line 2: the JSON in it cannot be read"),
    ("a.jsonl", '{"sources": "x", "sources": "y"}', "line 1: `sources` is there twice"),
    ("a.jsonl", '{"sources": 7}', "line 1: `sources` must be array"),
    ("a.jsonl", '{"sources": "x", "lora_alpha": NaN}', "line 1: the JSON in it cannot be read"),
    ("a.jsonl", "[" * 100_000, "line 1: the JSON in it cannot be read"),
    ("a.jsonl", '{"sources": "\\ud800"}', "half a surrogate pair"),
    ("a.csv", "output\ncat\n", "line 1: no column `sources`"),
    ("a.csv", "sources,sources\na,b\n", "line 1: a column is there twice"),
    ("a.csv", "sources,dtype\na\n", "line 2: 1 fields, and the first line names 2"),
    ("a.csv", 'sources\n"a\n', "line 2: unexpected end"),
    ("a.csv", "sources,ema\na,perhaps\n", "line 2: `ema` cannot be perhaps"),
    ("a.csv", "sources,image-size\na,big\n", "line 2: `image-size` cannot be big"),
    ("a.csv", "sources,colour\na,red\n", "line 2: it must not contain"),
    ("a.csv", "sources\na\0b\n", "line 2|line contains NUL"),
    ("a.txt", "hub:org/one\n/etc/passwd\n", "line 2: /etc/passwd is no name on the Hub"),
    ("a.txt", "org/../x\n", "line 1: org/../x is no name"),
    ("a.txt", "\x1b[31mred\n", r"line 1: \\x1b\[31mred is no name"),
    ("a.txt", "# nothing\n", "names no job"),
]


@pytest.mark.parametrize(("name", "text", "reason"), HOSTILE)
def test_hostile_lists(name: str, text: str | bytes, reason: str, place: Path) -> None:
    path = written(place, name, text)
    assert_refused(run("batch", path, "-o", place / "out"), path, reason)
    assert not (place / "out").exists()


PLACES = [
    ("../x", "lies outside"),
    ("/etc/x", "lies outside"),
    ("a/../../x", "lies outside"),
    (".", "lies outside"),
    (".batch/x", "batches keep such names"),
    ("batch.json", "batches keep such names"),
    ("/results/.x", "batches keep such names"),
]


@pytest.mark.parametrize(("output", "reason"), PLACES)
def test_outputs_lie_in_the_folder(output: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", f"[[job]]\nsources = 'x'\noutput = '{output}'")
    with pytest.raises(ConversionError, match=rf"job 1: `output` .*{reason}"):
        jobs(path)


def test_an_absolute_output_in_the_folder(tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", "[[job]]\nsources = 'x'\noutput = '/results/a/b'")
    assert [job.output for job in jobs(path)] == ["a/b"]


@pytest.mark.parametrize("outputs", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_outputs_are_not_in_each_others_way(outputs: tuple[str, str], tmp_path: Path) -> None:
    entries = [f"[[job]]\nsources = 'x'\noutput = '{output}'\n" for output in outputs]
    path = written(tmp_path, "a.toml", "".join(entries))
    with pytest.raises(ConversionError, match=r"job 2: the output .* that of .*job 1"):
        jobs(path)


def test_too_many_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_JOBS >= 10_000
    monkeypatch.setattr("weightport.batch.lists.MAX_JOBS", 2)
    path = written(tmp_path, "a.txt", "a/b\na/c\na/d\n")
    with pytest.raises(ConversionError, match="more than 2 jobs"):
        read_list(path)


SUFFIXES = [
    ("", ""),
    ("to = 'ldm'", ".safetensors"),
    ("to = 'kerascv'", ".weights.h5"),
    ("to = 'kohya'", ".safetensors"),
    ("expand = true", ".safetensors"),
    ("to = 'a1111'", ".pt"),
    ("extract_embeddings = true", ".safetensors"),
]


@pytest.mark.parametrize(("option", "suffix"), SUFFIXES)
def test_results_are_named_by_what_they_are(option: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", f"[[job]]\nsources = 'x/y.ckpt'\n{option}")
    (job,) = jobs(path)
    assert (job.name, re.sub("^y", "", job.output)) == ("y", suffix)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("push = 'org/x'\npush_pr = true", "choose one"),
        ("push_pr = true", "needs sources of one Hub repo"),
        ("keep = false", "would delete"),
        ("to = 'ldm'\nparity = true", "writes none"),
        ("lora = ['a.safetensors']\nparity = true", "--lora changes that"),
        ("to = 'ldm'\npush = 'org/x'", "--to ldm writes neither"),
    ],
)
def test_what_does_not_go_together(option: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", f"[[job]]\nsources = 'x'\n{option}")
    with pytest.raises(ConversionError, match=reason):
        jobs(path)


def test_two_results_are_not_pushed_to_one_place(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "a/b\na/c\n")
    with pytest.raises(ConversionError, match="2 jobs would go there"):
        jobs(path, push="org/x")
    assert [job.repo_id for job in jobs(path, push="org/my-{name}")] == ["org/my-b", "org/my-c"]
