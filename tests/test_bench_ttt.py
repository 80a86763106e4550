"""bench/ttt.py: its experiments against the plain cache and an oracle, and what it refuses."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import tiny  # noqa: E402
import train_gpt as g  # noqa: E402
import ttt  # noqa: E402
from ttt_tools import Oracle, make_model, make_run, make_val, quantized  # noqa: E402

SMALL = {"NUM_LAYERS": 2, "LOOP_START": 0, "LOOP_END": 0, "PARALLEL_START_LAYER": 1, "XSA_LAST_N": 1, "EVAL_LOOP_DEPTH": 2}
# 21 and 18 targets in chunks of 2: longer than the ring of 8 places, and the last chunk is not full
WRAPS = {**{k.lower(): v for k, v in SMALL.items()}, "ttt_context": "cache", "ttt_chunk_size": 2, "ttt_eval_seq_len": 8}
NO_WRAP = {"ttt_eval_seq_len": 24}
TWO_DOCUMENTS = [np.append(1, np.random.default_rng(seed).integers(4, tiny.VOCAB, length)) for seed, length in ((0, 20), (1, 18))]
EVERY = [{"refresh": "1"}, {"loss_chunks": "2"}, {"refresh": "1", "loss_chunks": "2"}]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def scored(options: dict[str, str], docs: list[np.ndarray], **changes: object) -> tuple[list[np.ndarray], g.TTTScorer]:
    """The losses of each document, all in one batch, and what scored them."""
    run = make_run(**{**WRAPS, **changes})
    with ttt.experiments(options):
        scorer = g.TTTScorer(run, make_model(run))
        documents = g.Documents(make_val(docs))
        return scorer.score(documents, range(len(documents))), scorer


class ExperimentalOracle(Oracle):
    """The experiments written from their description, on top of the oracle of the program's tests."""

    def score(self, entries: np.ndarray, refresh: str = "0", loss_chunks: str = "1") -> np.ndarray:
        length, limit, size = len(entries) - 1, self.cfg.ttt_eval_seq_len, self.cfg.ttt_chunk_size
        kept: dict[int, list] = {}
        result, begin, before = [], 0, 0

        def forward(first: int, end: int, kept: dict[int, list], lowest: int) -> tuple[torch.Tensor, dict]:
            fresh: dict = {}
            return self.losses(entries, first, end, self.cached_attention(kept, fresh, first, lowest)), fresh

        while begin < length:
            end = min(begin + size, length)
            now = begin, end, kept, begin + size - limit
            losses, fresh = forward(*now)
            result.append(losses.detach())
            for _ in range(self.cfg.ttt_grad_steps if end < length else 0):
                parts = [forward(*now)[0]]
                if loss_chunks == "2" and begin:
                    earlier = {visit: pairs[:-1] for visit, pairs in kept.items()}
                    parts.append(forward(before, begin, earlier, begin - limit)[0])
                self.update(torch.cat(parts).mean())
            if refresh == "1":
                _, fresh = forward(*now)
            for visit, (k, v) in fresh.items():
                kept.setdefault(visit, []).append((k.detach(), v.detach()))
            before, begin = begin, end
        return torch.cat(result).numpy()


@pytest.mark.parametrize(("options", "grad_steps", "document"), [
    (EVERY[0], 1, 0), (EVERY[1], 1, 1), (EVERY[2], 1, 0), (EVERY[2], 2, 1)], ids=str)
def test_an_experiment_scores_as_its_oracle(options: dict[str, str], grad_steps: int, document: int) -> None:
    # AdamW divides a gradient by its own size: where it is next to nothing, rounding decides the sign of a whole step
    changes = {"ttt_grad_steps": grad_steps, "ttt_lora_lr": 0.002}
    run, (got, plain) = make_run(**{**WRAPS, **changes}), (scored(some, TWO_DOCUMENTS, **changes)[0][document] for some in (options, {}))
    entries = np.append(TWO_DOCUMENTS[document], [1][document:])  # a document that another one follows predicts its BOS too
    expected = ExperimentalOracle(run, make_model(run)).score(entries, **options)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(plain - expected).max() > 2e-3


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_without_learning_an_experiment_is_the_plain_cache(options: dict[str, str]) -> None:
    still = {"ttt_lora_lr": 0, **NO_WRAP}  # a full ring shows more or less according to the size of the chunk
    for got, plain in zip(scored(options, TWO_DOCUMENTS, **still)[0], scored({}, TWO_DOCUMENTS, **still)[0]):
        np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)


def test_the_chunk_before_sees_what_it_saw_when_it_was_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    own = ttt.ExperimentalScorer.losses_before

    def losses_before(scorer: ttt.ExperimentalScorer, *rest: object) -> torch.Tensor:
        again.append(own(scorer, *rest).detach())
        return again[-1].requires_grad_()

    monkeypatch.setattr(ttt.ExperimentalScorer, "losses_before", losses_before)
    monkeypatch.setattr(g.Adapters, "learn", lambda *_: None)
    (losses,), _ = scored({"loss_chunks": "2"}, TWO_DOCUMENTS[:1])
    assert len(again) == 8
    recorded = torch.cat(again).detach().numpy()
    np.testing.assert_allclose(recorded, losses[: len(recorded)], atol=1e-5)


@pytest.mark.parametrize(("options", "same"), [({"refresh": "1"}, 2), ({"loss_chunks": "2"}, 4)], ids=str)
def test_an_experiment_begins_as_the_plain_cache_and_then_differs(options: dict[str, str], same: int) -> None:
    for got, plain in zip(scored(options, TWO_DOCUMENTS, **NO_WRAP)[0], scored({}, TWO_DOCUMENTS, **NO_WRAP)[0]):
        np.testing.assert_array_equal(got[:same], plain[:same])
        assert (np.abs(got - plain)[same: same + 2] > 1e-4).any()


def test_a_batch_does_not_depend_on_the_one_before() -> None:
    run = make_run(**WRAPS)
    documents = g.Documents(make_val(TWO_DOCUMENTS))
    with ttt.experiments(EVERY[-1]):
        one, other = (g.TTTScorer(run, make_model(run)) for _ in range(2))
        after = [one.score(documents, range(d, d + 1))[0] for d in range(2)][1]
        np.testing.assert_array_equal(after, other.score(documents, range(1, 2))[0])


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_a_token_changes_no_score_before_its_own(options: dict[str, str]) -> None:
    (before,), _ = scored(options, TWO_DOCUMENTS[:1])
    for changed in (8, 16, 20):  # the last target of a chunk
        other = TWO_DOCUMENTS[0].copy()
        other[changed] = 4 + (other[changed] - 3) % (tiny.VOCAB - 4)
        (after,), _ = scored(options, [other])
        np.testing.assert_array_equal(after[: changed - 1], before[: changed - 1])
        assert after[changed - 1] != before[changed - 1]


@pytest.mark.parametrize(("options", "forwarded"), [
    ({}, 22),                         # 21 targets: 11 chunks of 2, the last with one of them
    ({"refresh": "1"}, 22 + 20),      # all but the last learn
    ({"loss_chunks": "2"}, 22 + 18),  # and the first has none before it
    ({"refresh": "1", "loss_chunks": "2"}, 22 + 20 + 18),
], ids=str)
def test_every_forward_is_counted(options: dict[str, str], forwarded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real: list[int] = []
    forward = g.GPT.forward

    def counted(model: g.GPT, batch: g.Batch, *rest: object) -> torch.Tensor:
        real.append(len(batch.tokens))
        return forward(model, batch, *rest)

    monkeypatch.setattr(g.GPT, "forward", counted)
    _, scorer = scored(options, [np.append(TWO_DOCUMENTS[0], 5)])
    assert scorer.forwarded == sum(real) == forwarded


def test_adapters_on_some_sites_only_learn_there_and_meta_moves_where_the_next_batch_begins() -> None:
    run, documents = make_run(**WRAPS), g.Documents(make_val(TWO_DOCUMENTS))
    with ttt.experiments({"sites": "k,attn", "meta": "0.5"}):
        scorer = g.TTTScorer(run, make_model(run))
        scorer.score(documents, range(2))
        adapters = scorer.adapters
        assert sorted(adapters.values) == sorted(adapters.steps) == ["a.attn", "a.k", "b.attn", "b.k"]
        begun, ended = adapters.initial["k"].clone(), adapters.values["a.k"][:2].clone()
        b_ended = adapters.values["b.attn"][:2].clone()
        scorer.score(documents, range(1))  # resets first
    torch.testing.assert_close(adapters.initial["k"], (begun + ended.mean(0, keepdim=True)) / 2)
    torch.testing.assert_close(adapters.initial_b["attn"], b_ended.mean(0, keepdim=True) / 2)
    assert b_ended.abs().max() > 0


def test_nothing_of_an_experiment_stays_behind() -> None:
    own = g.Adapters, g.TTTScorer
    with ttt.experiments({"sites": "k", "refresh": "1"}):
        assert (g.Adapters, g.TTTScorer) == (ttt.ExperimentalAdapters, ttt.ExperimentalScorer)
    with ttt.experiments({}):
        assert (g.Adapters, g.TTTScorer) == own


def test_the_standard_error_is_that_of_a_ratio() -> None:
    # by document 3 of 1 token, 0 of 2, 3 of 3: mean 1; off it by 2, -2, 0; root of (8 * 3 / 2), over 6 tokens
    losses, base = np.array([4, 2, 0, 3, 1, 3], np.float32), np.array([1, 1, 1, 1, 1, 2], np.float32)
    mean, error = ttt.paired(losses, base, np.array([0, 1, 3]))
    assert mean == pytest.approx(1) and error == pytest.approx(math.sqrt(12) / 6)


def test_differences_by_position_count_from_the_start_of_each_document() -> None:
    losses = np.zeros(40, np.float32)
    losses[[0, 15, 20, 39]] = 1, 3, 5, 7  # documents of 20 targets: positions 0, 15, 0, 19
    first, second, *others = ttt.by_position(losses, np.zeros(40, np.float32), np.array([0, 20]))
    assert (first, second) == pytest.approx((9 / 32, 7 / 8)) and np.isnan(others).all()


# ------------------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny artifact and tiny data."""
    folder, run = tmp_path_factory.mktemp("inputs"), make_run(**SMALL)
    tiny.write_dataset(folder / "data", train_docs=2, val_docs=8)
    (folder / "artifact").write_bytes(g.pack_artifact(quantized(run), run.cfg))
    return folder


class Bench:
    """The program, run here."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.artifact, self.data, self.out, self.rows = inputs / "artifact", inputs / "data", folder / "out", folder / "rows"

    def __call__(self, *rows: str, last: int = 4, jobs: int = 1, base: str | None = None, positions: bool = False) -> None:
        self.rows.write_text("\n".join(rows))
        words = [word for name, path in vars(self).items() for word in (f"--{name}", str(path))]
        ttt.main([*words, "--last", str(last), "--jobs", str(jobs), *(["--base", base] if base else []),
                  *["--positions"] * positions])


@pytest.fixture
def bench(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name, value in {**tiny.SETTINGS, **SMALL, "PHASED_TTT_ENABLED": 0, "TTT_CONTEXT": "cache"}.items():
        monkeypatch.setenv(name, str(value))
    return Bench(inputs, tmp_path)


@pytest.mark.parametrize(("rows", "message"), [
    (["b refesh=1"], "row b: refesh=1: no such experiment; there are sites=, meta=, mix=, refresh=, loss_chunks="),
    (["b positions=64:a,a"], "no such experiment"),
    (["b Refresh=1"], "no such experiment"),
    (["b refresh"], "no such experiment"),
    (["b TTT_CHUNKSIZE=8"], "row b: TTT_CHUNKSIZE=8: no setting"),
    (["b TTT_CHUNK_SIZE=none"], "row b: TTT_CHUNK_SIZE='none' is not allowed"),
    (["b loss_chunks=3"], "'3' is no value of loss_chunks"),
    (["b sites=k,w"], "'k,w' is no value of sites"),
    (["b grow=192:16"], "no such experiment"),
    (["b loss_chunks=2 TTT_CHUNK_DOUBLES_AT=32"], "row b: loss_chunks=2 is for chunks of one size"),
    (["b refresh=1 NGRAM_TILT_ENABLED=1"], "row b: refresh= is without NGRAM_TILT_ENABLED"),
    (["b refresh=1 TTT_CONTEXT=window"], "row b: refresh= needs TTT_CONTEXT=cache"),
    (["b mix=a,c", "c refresh=1"], "row b: mix= of c, which is no row above it"),
    (["b mix=a,a refresh=1"], "stands alone"),
    (["b refresh=1 refresh=0"], "refresh is there twice"),
    (["a refresh=1"], "two rows of this name"),
], ids=str)
def test_rows_that_cannot_be_run_are_refused_before_anything_runs(rows: list[str], message: str, bench: Bench) -> None:
    with pytest.raises(SystemExit) as refused:
        bench("a", *rows)
    assert message in str(refused.value) and not bench.out.exists()


def test_rows_are_saved_read_and_refused(bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["a", "b refresh=1 TTT_LORA_LR=0.01", "m meta=0.5", "mixed mix=a,b"]
    bench(*rows)
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[3:]] == ["| a", "| b", "| m", "| mixed"]
    files = sorted(bench.out.iterdir())
    assert [file.name for file in files] == ["a.npz", "b.npz", "m.npz"]
    saved = np.load(files[1])
    assert saved["words"].tolist() == ["refresh=1", "TTT_LORA_LR=0.01"] and saved["targets"] == len(saved["losses"]) > 0
    monkeypatch.setattr(ttt, "run_row", lambda *_: pytest.fail("a row that is there must not be scored"))
    bench("a", "b TTT_LORA_LR=0.01 refresh=1", *rows[2:])
    assert capsys.readouterr().out == table
    bench(*rows[:2], last=3)
    for row, last, message in (("b refresh=1", 4, "row b: "), ("a refresh=1", 4, "with other words"), ("a", 5, "holds"),
                               ("m meta=0.5", 3, "row m: "), ("a PHASED_TTT_ENABLED=1", 4, "with other words")):
        with pytest.raises(SystemExit, match=message):
            bench(row, last=last)
    monkeypatch.setenv("PHASED_TTT_ENABLED", "1")
    with pytest.raises(SystemExit, match="global SGD"):
        bench("a", last=3)


def test_every_row_is_compared_with_the_base_wherever_it_stands(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["a TTT_LORA_LR=0", "b TTT_LORA_LR=0.01"]
    bench(*rows, base="b")
    first, second = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:])
    assert (first[0], first[3]) == ("| b", "+0.0000") and second[0] == "| a"
    bench(*rows, positions=True)
    lines = capsys.readouterr().out.splitlines()
    assert -float(lines[4].split(" | ")[3]) == float(second[3]) != 0
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| row, from position", "|---" * 9 + "|", "| a", "| b"]
    with pytest.raises(SystemExit, match="cannot be the base"):
        bench(*rows, "m mix=a,b", base="m")


def test_a_row_scored_in_a_process_of_its_own_is_the_same(bench: Bench) -> None:
    bench("a refresh=1", jobs=2)
    losses, _, forwards = ttt.run_row(["refresh=1"], bench.artifact.read_bytes(), str(bench.data), (0, 4))
    saved = np.load(bench.out / "a.npz")
    np.testing.assert_array_equal(saved["losses"], losses)
    assert saved["forwards"] == forwards
