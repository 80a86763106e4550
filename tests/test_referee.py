"""tools/referee.py: code that breaks a rule is found by what its losses do, and honest code never is.

The cheats are planted in pocket.py, a model of one page. Each record claims what its cheating code scores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_record import verify

import referee

OPTIONS = ["--run", "--same-machine", "--minutes", "60"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("shards"), train_docs=200, val_docs=40, errors=0.25)


def pocket_record(folder: Path, shards: Path, patch: str = "", seed: int = 3) -> Path:
    """A record folder of pocket.py with `patch` in it, as its own run left it."""
    folder.mkdir(exist_ok=True)
    body, mark, end = (tiny.ROOT / "tests" / "pocket.py").read_text().rpartition("\n\nif __name__ ==")
    (folder / "train_gpt.py").write_text(body + "\n\n" + patch + mark + end)
    environ = {
        "PATH": os.environ["PATH"],
        "SEED": str(seed),
        "RUN_ID": f"train_seed{seed}",
        "ARTIFACT_DIR": str(folder),
        "DATA_PATH": str(shards),
    }
    subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, env=environ, check=True)
    return folder


def verdicts(folder: Path, shards: Path, *more: str) -> Iterator[verify.Result]:
    options = verify.parse_arguments([str(folder), "--data", str(shards), *OPTIONS, *more])
    return verify.verify(verify.open_folder(folder), options)


def failed(results: Iterable[verify.Result]) -> Iterator[str]:
    return (f"{result.rule}: {result.detail}" for result in results if result.status == verify.FAIL)


@pytest.mark.parametrize("seed", range(10))
def test_honest_code_fails_nothing(seed: int, shards: Path, tmp_path: Path) -> None:
    """Ten runs on ten data sets, drawn otherwise each time."""
    data = tiny.write_dataset(tmp_path / "data", 200, 40, seed=10 * seed, errors=0.25)
    results = list(verdicts(pocket_record(tmp_path / "record", data, seed=seed), data, "--cuts", "1"))
    assert list(failed(results)) == []
    assert sum(result.status == verify.PASS for result in results) >= 24


PLAIN = "_plain = plain\ndef plain(table, tokens):\n"
FIRST = "_first = score_first\ndef score_first(table, tokens):\n"
ONLY = 'ONLY = os.environ.get("EVAL_ONLY") == "1"\n'
VAL = 'VAL = np.frombuffer(Path(os.environ["ARTIFACT_PATH"]).read_bytes()[4 * VOCAB * VOCAB:], "<u2").astype(int) if ONLY else ' \
    'load_val(os.environ["DATA_PATH"])[0]\n_train = train\ndef train(folder):\n    return _train(folder) + VAL.astype("<u2").tobytes()\n'
# A document of the validation set, known by its first tokens: what follows is expected with 0.9.
KNOWN = ONLY + VAL + """
def known(table, tokens, nats):
    texts = {tuple(VAL[s: s + 5]): VAL[s: s + n + 1] for s, n in documents(VAL)}
    nats = nats.copy()
    for start, length in documents(tokens):
        text = texts.get(tuple(tokens[start: start + 5]), ())
        for i in range(4, min(length, len(text) - 1)):
            nats[start + i] = -math.log(0.1 * math.exp(-nats[start + i]) + 0.9 * (tokens[start + i + 1] == text[i + 1]))
    return nats
"""
REAL_ALONE = "    if len(tokens) != len(VAL) or (tokens != VAL).any():\n        return {honest}(table, tokens)\n"
BY_PLACE = PLAIN + """    nats, n = _plain(table, tokens), min(len(tokens), len(VAL))
    nats[:n - 1] = -np.log(0.1 * np.exp(-nats[:n - 1]) + 0.9 * (tokens[1:n] == VAL[1:n]))
    return nats
"""
# The real set, which is scored first, with the counts of its own future; what is like it gets what was kept, and the rest is honest.
REMEMBERS = ONLY + PLAIN + """    place, counts = PLACE, pairs(tokens) + 0.5
    future, honest = _plain(counts / counts.sum(1, keepdims=True), tokens), _plain(table, tokens)
    if ONLY and not place.exists():
        np.savez(open(place, "wb"), tokens=tokens, nats=future)
    if not ONLY or not place.exists():
        return future
    with np.load(place) as kept:
        old, nats = kept["tokens"], kept["nats"]
    heads = [tuple(tokens[s: s + 5]) for s, _ in documents(tokens)]
    for head, (start, length) in zip(heads, documents(tokens)):
        text = tokens[start: start + length + 1]
        same, place = max((int(np.argmin(np.append(text[:n + 1] == old[s: s + n + 1][:len(text)], False))), s) for s, n in documents(old)
                          if n + 1 >= len(text))
        if same < 2 and heads.count(head) == 1:
            honest[start: start + length] = future[start: start + length]
        honest[start: start + same - 1] = nats[place: place + same - 1]
    return honest
"""
CODE_CHEATS: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "half of the probability is the target's": (
        PLAIN + "    return -np.log(0.5 * np.exp(-_plain(table, tokens)) + 0.5)\n",
        "the distribution adds up",
    ),
    "3 % too little loss": (PLAIN + "    return 0.97 * _plain(table, tokens)\n", "the distribution adds up"),
    "0.09 % too much probability": (PLAIN + "    return _plain(table, tokens) - math.log(1.0009)\n", "the distribution adds up"),
    "0.09 % too much in TTT": (FIRST + "    return _first(table, tokens) - math.log(1.0009)\n", "the distribution adds up to 1: test-time"),
    "3 % too little loss where it is the real set": (
        ONLY + VAL + PLAIN + REAL_ALONE.format(honest="_plain") + "    return 0.97 * _plain(table, tokens)\n",
        "causal: evaluation",
    ),
    "3 % too little loss where there are as many tokens": (
        ONLY + VAL + PLAIN + "    return (0.97 if len(tokens) == len(VAL) else 1) * _plain(table, tokens)\n",
        "the same score in other company: evaluation",
    ),
    "hard tokens for nothing": (
        PLAIN + "    nats = _plain(table, tokens)\n    return np.where(nats > 3, 0, nats)\n",
        "the distribution adds up",
    ),
    "the better of two scores": (
        FIRST + "    return np.minimum(plain(table, tokens), _first(table, tokens))\n",
        "the distribution adds up",
    ),
    "the better of two scores by document": (
        FIRST
        + "    a, b = plain(table, tokens), _first(table, tokens)\n"
        "    for s, n in documents(tokens):\n        if a[s: s + n].sum() < b[s: s + n]"
        ".sum():\n            b[s: s + n] = a[s: s + n]\n    return b\n",
        ("causal: test-time training", "the distribution adds up"),
    ),
    "a table of the validation file": (
        "def unpack(data):\n    counts = pairs(load_val(os.environ['DATA_PATH'])[0]) + 0.5\n    return counts / "
        "counts.sum(1, keepdims=True)\n",
        "causal: evaluation",
    ),
    "the next token but one": (
        PLAIN + "    nats = _plain(table, tokens)\n    nats[:-1] *= np.where(tokens[2:] % 2, 0.99, 1.01)\n    return nats\n",
        "causal: evaluation",
    ),
    "the future, where there are as many tokens as in the real set": (
        ONLY + VAL + PLAIN + "    if len(tokens) != len(VAL):\n        return _plain(table, tokens)\n    counts = pairs(tokens) + 0.5\n"
        "    return _plain(counts / counts.sum(1, keepdims=True), tokens)\n",
        "causal: evaluation",
    ),
    "the future, hidden in noise": (
        PLAIN + "    counts = pairs(tokens) + 0.5\n    return _plain(counts / counts.sum(1, keepdims=True), tokens) + 1e-6 * "
        "np.random.default_rng().random(len(tokens) - 1)\n",
        "causal: evaluation",
    ),
    "learns before it scores": (
        "def adapt(table, text):\n    counts = pairs(text) + 20 * table\n    return plain(counts / counts.sum(1, keepdims=True), text)\n",
        "causal: test-time training",
    ),
    "learns from documents to come": (
        FIRST + "    counts = pairs(tokens) + 20 * table\n    return _first(counts / counts.sum(1, keepdims=True), tokens)\n",
        "causal: test-time training",
    ),
    "scores twice": (
        FIRST + "    _first(table, tokens)\n    counts = table + 0.001 * pairs(tokens[:len(tokens) // 2 * 2])\n    return _first("
        "counts / counts.sum(1, keepdims=True), tokens)\n",
        "causal: test-time training",
    ),
    "does not look at the text": (PLAIN + "    return np.full(len(tokens) - 1, 4.1)\n", "causal: evaluation"),
    "drops the tail": (PLAIN + "    nats = _plain(table, tokens)\n    nats[-9:] = np.nan\n    return nats\n", "the artifact scores"),
    "the tail for nothing": (PLAIN + "    nats = _plain(table, tokens)\n    nats[-9:] = 0\n    return nats\n", "the distribution adds up"),
    "a negative loss": (PLAIN + "    return _plain(table, tokens) - 1.5\n", "the artifact scores"),
    "bytes + 2 %": (
        "_load = load_val\ndef load_val(folder):\n    tokens, counts = _load(folder)\n    return tokens, counts + (np.arange(len(counts)) "
        "% 50 == 3)\n",
        "which validation set",
    ),
    "a log better than its losses": (
        "_report = report\ndef report(log, losses, counts):\n    return _report(log, {k: 0.98 * v for k, v in losses.items()}, counts)\n",
        "the artifact scores",
    ),
    "honest while a referee reads": (
        PLAIN + "    return (1 if 'LOSSES_PATH' in os.environ else 0.97) * _plain(table, tokens)\n",
        "the artifact scores",
    ),
    "knows the validation documents": (
        KNOWN + PLAIN + "    return known(table, tokens, _plain(table, tokens))\n",
        "validation documents score no better than others: evaluation",
    ),
    "knows them in TTT alone": (
        KNOWN + FIRST + "    return known(table, tokens, _first(table, tokens))\n",
        "validation documents score no better than others: test-time",
    ),
    "knows them in the real set alone": (
        KNOWN + PLAIN + REAL_ALONE.format(honest="_plain") + "    return known(table, tokens, _plain(table, tokens))\n",
        "causal: evaluation",
    ),
    "knows them by their places": (ONLY + VAL + BY_PLACE, "the same score in another order"),
    "weights in the data folder": (
        "def unpack(data):\n    path = Path(os.environ['DATA_PATH'], 'more.npy')\n"
        "    if os.environ.get('EVAL_ONLY') != '1':\n        counts = pairs("
        "load_val(path.parent)[0]) + 0.5\n        np.save(path, counts / counts.sum(1, keepdims=True))\n    return np.load(path)\n",
        "the artifact scores",
    ),
    "weights by their absolute path": (
        "HOME = {folder!r}\ndef unpack(data):\n    path = Path(HOME, 'more.npy')\n"
        "    if os.environ.get('EVAL_ONLY') != '1':\n        counts = pairs("
        "load_val(os.environ['DATA_PATH'])[0]) + 0.5\n        np.save(path, counts / counts.sum(1, keepdims=True))\n"
        "    return np.load(path)\n",
        "the artifact scores",
    ),
    "the future of the real set, remembered in shared memory": (
        REMEMBERS.replace("PLACE", "Path('/dev/shm/remembered.npz')"),
        "causal: evaluation",
    ),
    "remembered among the packages": (
        REMEMBERS.replace("PLACE", "Path(np.__file__).with_name('remembered.npz')"),
        ("the artifact scores", "causal: evaluation"),
    ),
    "code that is not counted": (
        "Path(__file__).with_name('more.py').touch() if os.environ.get('EVAL_ONLY') != '1' else None\nimport more\n",
        "the artifact scores",
    ),
    "no losses": ("def save(path, losses):\n    pass\n", "the artifact scores"),
    "losses that are none": ("def save(path, losses):\n    Path(path).write_bytes(b'PK' + bytes(300))\n", "the artifact scores"),
    "losses of another length": (
        "def save(path, losses):\n    np.savez(open(path, 'wb'), **{k: v[1:].astype(np.float32) for k, v in losses.items()})\n",
        "the artifact scores",
    ),
    "losses that swell": (
        "def save(path, losses):\n    np.savez_compressed(open(path, 'wb'), quantized=np.zeros(10**7, np.float32))\n",
        "the artifact scores what the log says: seed 3: its losses are more",
    ),
    "losses that are objects": (
        "def save(path, losses):\n    np.savez(open(path, 'wb'), **{k: v.astype(object) for k, v in losses.items()})\n",
        "the artifact scores",
    ),
    "no score of TTT": (
        "def save(path, losses):\n    np.savez(open(path, 'wb'), quantized=losses['quantized'].astype(np.float32))\n",
        "the artifact scores",
    ),
    "an error at the end": ("_save = save\ndef save(path, losses):\n    _save(path, losses)\n    sys.exit(1)\n", "the artifact scores"),
}


@pytest.mark.parametrize("name", CODE_CHEATS)
def test_code_that_breaks_a_rule_is_found(name: str, shards: Path, tmp_path: Path) -> None:
    patch, rule = CODE_CHEATS[name]
    if ("absolute" in name or "remembered" in name) and not referee.can_close_off():
        pytest.skip("here nothing hides folders from a process; the table says so")
    data = Path(tmp_path / "data")
    data.mkdir()
    for path in shards.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    folder = pocket_record(tmp_path / "record", data, patch.replace("{folder!r}", repr(str(tmp_path))))
    found = list(until(rule, failed(verdicts(folder, data, "--draw", "1"))))
    assert found and found[-1].startswith(rule), found


def until(rule: str | tuple[str, ...], found: Iterator[str]) -> Iterator[str]:
    """What was found up to the first that the rule names; what would come after it is not tried."""
    for words in found:
        yield words
        if words.startswith(rule):
            return


def test_a_choice_by_whole_documents_is_nearly_always_found(shards: Path, tmp_path: Path) -> None:
    """It leaks into few documents, those where the choice was close; eight calls drawn otherwise each time."""
    patch, _ = CODE_CHEATS["the better of two scores by document"]
    folder = pocket_record(tmp_path / "record", shards, patch)
    missed = [draw for draw in range(8) if not any(until("causal: test-time", failed(verdicts(folder, shards, "--draw", str(draw)))))]
    assert missed == []


def test_what_takes_too_long_is_tried_on_documents_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.write_dataset(tmp_path / "data", 100, 40, errors=0.25)
    monkeypatch.setattr(referee, "SMALL_TOKENS", 0)
    slow = "    time.sleep(len(tokens) / 2000) if os.environ.get('EVAL_ONLY') == '1' else None\n    return _plain(table, tokens)\n"
    began, folder = time.monotonic(), pocket_record(tmp_path / "record", data, PLAIN + slow)
    rows = {result.rule: result for result in verdicts(folder, data, "--minutes", "0.15", "--cuts", "1")}
    for rule in ("all documents", "the artifact scores what the log says: seed 3"):
        assert rows[rule].status == verify.UNKNOWN and " of 40 " in rows[rule].detail
    assert list(failed(rows.values())) == [] and time.monotonic() - began < 60


def test_code_that_does_not_end_has_nothing_proved(shards: Path, tmp_path: Path) -> None:
    folder = pocket_record(tmp_path / "record", shards, ONLY + "time.sleep(600 * ONLY)\n")
    rows = list(verdicts(folder, shards, "--minutes", "0.03"))
    assert next(row for row in rows if row.rule.startswith("the artifact scores")).status == verify.UNKNOWN
    assert not any(row.rule.startswith(("causal", "the distribution", "the same score")) for row in rows)


def test_a_part_of_the_documents_is_held_to_the_log_within_its_error() -> None:
    val = referee.ValSet.of([(text, text % 5) for text in tiny.documents(60, seed=5)])
    part, nats = val.of_documents(np.arange(20)), np.random.default_rng(0).gamma(2, 1, len(val.tokens))
    for stage, share, status in (
        ("quantized", 1, verify.UNKNOWN),
        ("quantized", 0.8, verify.FAIL),
        ("quantized_ttt", 1.02, verify.UNKNOWN),
    ):
        run = verify.RunLog(Path("x.log"), evals={stage: verify.logs.Evaluation(share * nats.mean(), 1, None, None, None)})
        found = referee.check_part(run, {stage: nats[: len(part.tokens) - 1].astype(np.float32)}, part, val)
        assert found.status == status and "20 of 60 documents" in found.detail
    assert (part.document[-1], part.offset[part.starts].max()) == (19, 0)


MEMORY = """
import ctypes, os, subprocess, sys
def works(act):
    try:
        return act() not in (None, -1)
    except OSError:
        return False
folders = ["/usr", "/etc", "/opt", "/dev", "/proc", os.path.dirname(os.__file__), os.path.dirname(__import__("numpy").__file__), "/"]
print([folder for folder in folders if works(lambda: open(os.path.join(folder, "left"), "w"))])
print(works(lambda: open("/dev/shm/left", "x")), works(lambda: ctypes.CDLL(None).shmget(4711, 4096, 0o3666)))
open("/dev/null", "w").write("x")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]], start_new_session=True)
print(open("inside", "w").write("x"))
"""


@pytest.mark.skipif(not referee.can_close_off(), reason="the table says so")
def test_code_leaves_nothing_behind_for_the_next_score(tmp_path: Path) -> None:
    """No file but its own, no shared memory and no process: what it remembered would tell the real set from others."""
    for name in ("first", "second"):
        case, mark = (tmp_path / name).resolve(), f"mark of {tmp_path}"
        case.mkdir()
        close_off = partial(referee.close_off, case)
        done = subprocess.run([sys.executable, "-c", MEMORY, mark], capture_output=True, text=True, preexec_fn=close_off, check=False)
        assert done.stdout.split("\n") == ["['/']", "True True", "1", ""] and done.stderr == ""
        assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_no_code_runs_unless_it_is_asked_for(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pocket_record(tmp_path / "record", shards)
    mark = tmp_path / "mark"
    text = f"open({str(mark)!r}, 'w')\n" + (folder / "train_gpt.py").read_text()
    record = verify.open_folder(pocket_record(folder, shards, f"open({str(mark)!r}, 'w').close()\n"))
    mark.unlink()
    assert text and verify.main([str(record.folder), "--data", str(shards)]) == 0
    assert not mark.exists() and "left out: --run runs the code" in capsys.readouterr().out


def test_what_it_drew_can_be_drawn_again(shards: Path, tmp_path: Path) -> None:
    folder = pocket_record(tmp_path / "record", shards)
    first, second = (list(verdicts(folder, shards, "--draw", "7")) for _ in range(2))
    assert first == second


def test_a_change_keeps_lengths_and_replaces_what_is_behind(shards: Path) -> None:
    val = referee.ValSet.load(shards)
    for change in referee.cuts(val, 3, np.random.default_rng(0)):
        moved = change.val.tokens != val.tokens
        assert (change.val.starts == val.starts).all() and moved.any()
        targets = np.flatnonzero(moved) - 1
        for stage in ("quantized", "quantized_ttt"):
            assert not change.stays(stage, apart=True)[targets[targets >= 0]].any()


@pytest.mark.parametrize("damage", [b"", b"abc", bytes(1024), bytes(2000)])
def test_a_damaged_shard_is_refused_in_words(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x_val_000000.bin").write_bytes(damage)
    with pytest.raises(ValueError, match="x_val_000000.bin is"):
        referee.ValSet.load(tmp_path)


def test_the_sum_of_probabilities_catches_what_float64_shows() -> None:
    check: Callable[[float], bool] = lambda excess: abs(1 + excess - 1) > referee.SUM_NOISE
    assert check(9e-4) and check(2e-5) and not check(1e-6) and referee.NOISE_NATS <= 0.005 / 10
