"""tools/verify.py: an honest record passes, and each broken rule is found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_record
from tiny_record import made, verify

OPTIONS = ["--cuts", "3"]


def status_of(results: list[verify.Result], rule: str) -> str:
    """The status of the one row whose rule starts with `rule`."""
    found = [result for result in results if result.rule.startswith(rule)]
    assert len(found) == 1, [result.rule for result in results]
    return found[0].status


def folder_checks(folder: Path) -> list[verify.Result]:
    return verify.check_folder(verify.open_folder(folder))


def failed_rules(folder: Path) -> list[str]:
    return [result.rule for result in folder_checks(folder) if result.status == verify.FAIL]


def test_an_honest_record_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(made().record), "--data", str(made().data), "--same-machine", *OPTIONS]
    assert verify.main(arguments) == 0
    table = capsys.readouterr().out
    assert " 0 fail" in table
    for rule in ("causal: evaluation", "causal: test-time training, phases included", "documents do not see each other: evaluation",
                 "documents do not see each other: test-time", "the distribution adds up to 1: evaluation",
                 "the distribution adds up to 1: test-time", "every target has exactly one loss", "no validation document",
                 *(f"the artifact scores what the log says: seed {seed}" for seed in tiny_record.SEEDS)):
        assert re.search(rf"^pass +{re.escape(rule)}", table, re.MULTILINE), rule
    assert table.count(": exactly") == len(tiny_record.SEEDS)


def test_the_records_of_this_repository_agree_with_their_logs() -> None:
    folders = [path.parent for path in (tiny.ROOT / "records").glob("track_*/*/submission.json")]
    assert folders
    for folder in folders:
        assert failed_rules(folder) == [], folder.name


def test_what_cannot_be_checked_is_said_and_strict_counts_it() -> None:
    assert verify.main([str(made().record), "--folder-only"]) == 0
    assert verify.main([str(made().record), "--folder-only", "--strict"]) == 1
    assert verify.main([str(made().record / "tokenizers")]) == 2


def test_an_artifact_without_a_log_is_audited_and_scored(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**tiny_record.settings(), "SEED": "3"}.items():
        monkeypatch.setenv(name, value)
    artifact = made().record / "train_seed3.artifact"
    assert verify.main(["--artifact", str(artifact), "--data", str(made().data), "--code", str(made().code), "--cuts", "1"]) == 0
    table = capsys.readouterr().out
    score = verify.logs.read_log(made().record / "train_seed3.log").final.val_bpb
    assert re.search(r"^pass +causal: test-time training", table, re.MULTILINE) and f"quantized_ttt {score:.8f}" in table
    assert verify.main(["--artifact", str(artifact.with_name("none"))]) == 2


# ---------------------------------------------------------------------------------------------------------- the folder


def spoil_code(folder: Path) -> None:
    (folder / "train_gpt.py").write_text((folder / "train_gpt.py").read_text() + "\n# one more line\n")


def spoil_artifact(folder: Path) -> None:
    """The artifact of another seed."""
    (folder / "train_seed3.artifact").write_bytes((folder / "train_seed4.artifact").read_bytes())


def spoil_setting(folder: Path) -> None:
    tiny_record.rewrite(folder / "train_seed4.log", "TTT_LORA_LR value:0.02", "TTT_LORA_LR value:0.01")


def spoil_last_line(folder: Path) -> None:
    log = folder / "train_seed5.log"
    score = re.search(r"final seed:5 val_loss:\S+ val_bpb:(\S+)", log.read_text())[1]
    tiny_record.rewrite(log, f"val_bpb:{score} pre_ttt", f"val_bpb:{float(score) - 0.01:.8f} pre_ttt")


def spoil_claim(folder: Path) -> None:
    page = folder / "submission.json"
    page.write_text(re.sub(r'"val_bpb": [\d.]+', '"val_bpb": 1.0', page.read_text(), count=1))


def spoil_targets(folder: Path) -> None:
    log = folder / "train_seed3.log"
    log.write_text(re.sub(r"(eval name:quantized_ttt .* tokens:)(\d+)", lambda m: m[1] + str(int(m[2]) - 7), log.read_text()))


def spoil_end(folder: Path) -> None:
    log = folder / "train_seed3.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith("final ")))


def spoil_seed(folder: Path) -> None:
    """The log of one seed under the name of another."""
    (folder / "train_seed3.log").write_bytes((folder / "train_seed4.log").read_bytes())


FOLDER_CASES: list[tuple[Callable[[Path], None], str]] = [
    (spoil_code, "the folder's code is the code that ran"), (spoil_artifact, "artifact and code within the cap"),
    (spoil_setting, "one configuration"), (spoil_last_line, "BPB = nats"), (spoil_claim, "submission.json"),
    (spoil_targets, "every target counted once"), (spoil_end, "every seed's run is complete"), (spoil_seed, "every seed's run is complete"),
]


@pytest.mark.parametrize("spoil, rule", FOLDER_CASES, ids=[spoil.__name__ for spoil, _ in FOLDER_CASES])
def test_a_spoilt_folder_is_found(spoil: Callable[[Path], None], rule: str, tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    assert failed_rules(folder) == []
    spoil(folder)
    assert any(found.startswith(rule) for found in failed_rules(folder))


def test_a_folder_that_lies_in_another_track_than_it_says_is_found(tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / verify.RECORD_TRACK / "record")
    assert status_of(folder_checks(folder), "submission.json") == verify.FAIL


def test_over_the_cap_is_found(tmp_path: Path) -> None:
    """An artifact of 16,000,000 bytes whose log counts right: with the code it is too much."""
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    log, artifact = folder / "train_seed3.log", folder / "train_seed3.artifact"
    small, code_bytes = artifact.stat().st_size, (folder / "train_gpt.py").stat().st_size
    old_hash = hashlib.sha256(artifact.read_bytes()).hexdigest()
    artifact.write_bytes(bytes(16_000_000))
    for old, new in ((f"model_bytes:{small}", "model_bytes:16000000"), (old_hash, hashlib.sha256(bytes(16_000_000)).hexdigest()),
                     (f"total_bytes:{small + code_bytes}", f"total_bytes:{16_000_000 + code_bytes}")):
        tiny_record.rewrite(log, old, new)
    detail = next(result.detail for result in folder_checks(folder) if result.rule.startswith("artifact and code"))
    assert "over the cap of 16,000,000" in detail


@pytest.mark.parametrize("what", ["train_ms", "eval_ms"])
def test_over_the_time_is_found_on_the_record_track_alone(what: str, tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    log = folder / "train_seed3.log"
    log.write_text(re.sub(rf"^(final .* {what}:)\d+", r"\g<1>600001", log.read_text(), flags=re.MULTILINE))
    rule = "training within" if what == "train_ms" else "evaluation within"
    assert status_of(folder_checks(folder), rule) == verify.PASS
    tiny_record.rewrite(folder / "submission.json", verify.OTHER_TRACK, verify.RECORD_TRACK)
    assert status_of(folder_checks(folder), rule) == verify.FAIL


# ------------------------------------------------------------------------------------------------------------ the data


def subject_with(data: Path) -> verify.Subject:
    return verify.open_subject(verify.open_folder(made().record), data, None)


def test_a_validation_document_in_the_training_data_is_found(tmp_path: Path) -> None:
    """Even where the document runs across the border of two shards."""
    assert verify.check_disjoint(subject_with(made().data)).status == verify.PASS
    data = tiny_record.copy_of(made().data, tmp_path / "data")
    stolen = tiny.documents(16, seed=2)[9]
    first, second = (data / f"tiny_train_00000{i}.bin" for i in (0, 1))
    for path, piece, behind in ((first, stolen[:7], True), (second, stolen[7:], False)):
        entries = np.frombuffer(path.read_bytes(), "<u2")[512:]
        if not behind:
            entries = entries[np.flatnonzero(entries == 1)[0]:]
        path.write_bytes(tiny.shard_bytes(np.concatenate([entries, piece] if behind else [piece, entries])))
    result = verify.check_disjoint(subject_with(data))
    assert result.status == verify.FAIL and result.detail.startswith("1 of ")


def test_missing_train_shards_are_not_checkable(tmp_path: Path) -> None:
    data = tiny_record.copy_of(made().data, tmp_path / "data")
    (data / "tiny_train_000001.bin").unlink()
    assert verify.check_disjoint(subject_with(data)).status == verify.UNKNOWN
    (data / "tiny_train_000000.bin").unlink()
    assert verify.check_disjoint(subject_with(data)).status == verify.UNKNOWN


def test_another_validation_set_than_the_log_says_is_found(tmp_path: Path) -> None:
    other = tiny.write_dataset(tmp_path / "data", train_docs=60, val_docs=15)
    assert verify.check_which_data(subject_with(other)).status == verify.FAIL


def test_a_sidecar_that_charges_too_much_is_found(tmp_path: Path) -> None:
    """The 3 bytes of an operator are no bytes of the text; made with the real tokenizer."""
    import sentencepiece

    import lossless_caps

    model = tiny.ROOT / "tokenizers" / "caseops_8192_lossless.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "A Tale of TWO Cities,\n  by McDonald – naïve \ue001 ﬁne"
    ids = np.array([1, *tokenizer.encode(lossless_caps.encode(text))], np.uint16)
    counter = lossless_caps.ByteCounter()
    pieces, _ = verify.tokenizer_pieces(model)
    counts = np.array([0, *(len(pieces[i]) for i in ids[1:])], np.uint16)
    decoded = b"".join(pieces[i] for i in ids[1:]).decode()
    operators = len(decoded.encode()) - counter.feed(decoded)
    subject = subject_with(made().data)
    subject.cfg = verify.replace(subject.cfg, tokenizer_path=str(model))
    # The operators' bytes are taken from the first tokens that have enough; only the sum of a document is compared.
    honest = counts.copy()
    for i in np.flatnonzero(np.isin(ids, range(4, 8)))[: operators // 3]:
        honest[i] = 0
    subject.val = subject.code.ValData(ids, honest, 1)
    assert verify.check_bytes(subject, None).status == verify.PASS
    subject.val = subject.code.ValData(ids, counts, 1)
    assert verify.check_bytes(subject, None).status == verify.FAIL
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"text": "another text"}\n')
    subject.val = subject.code.ValData(ids, honest, 1)
    assert verify.check_bytes(subject, documents).status == verify.FAIL


# ------------------------------------------------------------------------------------------------------------ the code

SEES_THE_FUTURE = """
def segment_attention(q, k, v, cu_seqlens):
    runs = segment_runs(cu_seqlens)
    parts = zip(split_runs(q, runs), split_runs(k, runs), split_runs(v, runs))
    return join_runs([F.scaled_dot_product_attention(*part, is_causal=False, enable_gqa=True) for part in parts])
"""
SEES_OTHER_DOCUMENTS = """
_make_batch = make_batch
def make_batch(tokens, targets, starts, longest, device):
    return _make_batch(tokens, targets, starts[:1], len(tokens), device)
"""
DROPS_THE_TAIL = """
_evaluate = evaluate
def evaluate(run, model, val, name, depth):
    return _evaluate(run, model, ValData(val.tokens[:-9], val.byte_counts[:-9], val.documents), name, depth)
"""
COUNTS_EASY_TARGETS_TWICE = """
_evaluate = evaluate
def evaluate(run, model, val, name, depth):
    score = _evaluate(run, model, val, name, depth)
    return score._replace(nats=score.nats + float(score.losses[:5].sum()), tokens=score.tokens)
"""
CHARGES_MORE_BYTES = """
_evaluate = evaluate
def evaluate(run, model, val, name, depth):
    score = _evaluate(run, model, val, name, depth)
    return score._replace(num_bytes=score.num_bytes + 3)
"""
LEARNS_BEFORE_IT_SCORES = """
_score = Adapter.score
def score(self, documents, members):
    _score(self, documents, members)
    reset, Adapters.reset = Adapters.reset, lambda self: None
    try:
        return _score(self, documents, members)
    finally:
        Adapters.reset = reset
Adapter.score = score
"""
LEARNS_FROM_DOCUMENTS_TO_COME = """
_global_sgd = global_sgd
def global_sgd(run, model, text, phase):
    _global_sgd(run, model, np.asarray(EVERYTHING[0]), phase)
_score_with_ttt = score_with_ttt
EVERYTHING = [None]
def score_with_ttt(run, model, val):
    EVERYTHING[0] = val.tokens
    return _score_with_ttt(run, model, val)
"""
TOO_MUCH_PROBABILITY = """
_cross_entropy = softcapped_cross_entropy
def softcapped_cross_entropy(logits, targets, cap):
    return _cross_entropy(logits, targets, cap) * 0.97
"""
TAKES_THE_BETTER_SCORE = """
_ttt = score_with_ttt
def score_with_ttt(run, model, val):
    plain = evaluate(run, model, val, "plain", run.cfg.eval_loop_depth)
    score, time_ms = _ttt(run, model, val)
    best = np.minimum(plain.losses, score.losses)
    return score._replace(losses=best, nats=float(best.sum(dtype=np.float64))), time_ms
"""
IGNORES_THE_TEXT = """
_evaluate = evaluate
def evaluate(run, model, val, name, depth):
    return _evaluate(run, model, val._replace(tokens=np.where(val.tokens == 1, 1, 9).astype(np.uint16)), name, depth)
"""


def audited(patch: str, folder: Path) -> verify.Auditor:
    """An auditor of the record's code with something added to it."""
    folder.mkdir()
    source = made().record / "train_gpt.py"
    body, mark, end = source.read_text().rpartition("\n\nif __name__ ==")
    (folder / "train_gpt.py").write_text(body + "\n\n" + patch + mark + end)
    record = verify.open_folder(made().record)
    record.folder = folder
    return verify.Auditor(verify.open_subject(record, made().data, None), record.artifacts[record.runs[0].path])


CODE_CASES: list[tuple[str, str, Callable[[verify.Auditor], verify.Result]]] = [
    ("sees the future, evaluation", SEES_THE_FUTURE, lambda auditor: verify.check_causal(auditor, False, 3)),
    ("sees the future, TTT", SEES_THE_FUTURE, lambda auditor: verify.check_causal(auditor, True, 3)),
    ("sees other documents", SEES_OTHER_DOCUMENTS, lambda auditor: verify.check_isolated(auditor, False)),
    ("learns before it scores", LEARNS_BEFORE_IT_SCORES, lambda auditor: verify.check_causal(auditor, True, 3)),
    ("learns from documents to come", LEARNS_FROM_DOCUMENTS_TO_COME, lambda auditor: verify.check_causal(auditor, True, 3)),
    ("ignores the text", IGNORES_THE_TEXT, lambda auditor: verify.check_causal(auditor, False, 3)),
    ("too much probability, evaluation", TOO_MUCH_PROBABILITY, lambda auditor: verify.check_normalised(auditor, False, 60)),
    ("too much probability, TTT", TOO_MUCH_PROBABILITY, lambda auditor: verify.check_normalised(auditor, True, 60)),
    ("takes the better score", TAKES_THE_BETTER_SCORE, lambda auditor: verify.check_normalised(auditor, True, 60)),
]


@pytest.mark.parametrize("patch, check", [case[1:] for case in CODE_CASES], ids=[case[0] for case in CODE_CASES])
def test_code_that_breaks_a_rule_is_found(patch: str, check: Callable[[verify.Auditor], verify.Result], tmp_path: Path) -> None:
    result = check(audited(patch, tmp_path / "code"))
    assert result.status == verify.FAIL, result.detail


@pytest.mark.parametrize("settings", [{}, {"ttt_chunk_size": 4, "ttt_chunk_doubles_at": (192, 768)}], ids=str)
def test_the_other_way_to_keep_context_passes_the_same_audit(settings: dict[str, object]) -> None:
    record = verify.open_folder(made().record)
    subject = verify.open_subject(record, made().data, None)
    subject.cfg = verify.replace(subject.cfg, ttt_context="cache", **settings)
    auditor = verify.Auditor(subject, record.artifacts[record.runs[0].path])
    assert auditor.cfg.ttt_chunk_doubles_at == ((8, 16) if "ttt_chunk_doubles_at" in settings else ())  # in sight of the documents
    for result in (verify.check_causal(auditor, True, 3), verify.check_isolated(auditor, True), verify.check_normalised(auditor, True, 60)):
        assert result.status == verify.PASS, result.detail


@pytest.mark.parametrize("patch", [DROPS_THE_TAIL, COUNTS_EASY_TARGETS_TWICE, CHARGES_MORE_BYTES],
                         ids=["drops the tail", "counts twice", "charges more bytes"])
def test_a_target_that_is_not_scored_once_is_found(patch: str, tmp_path: Path) -> None:
    auditor = audited(patch, tmp_path / "code")
    tokens, byte_counts = auditor.sample(6, 30)
    with pytest.raises(verify.AuditError):
        auditor.losses(tokens, False, byte_counts)


def test_a_score_better_than_the_artifacts_is_found(tmp_path: Path) -> None:
    """A log whose figures agree with each other, but not with the artifact; and code that needs more than the artifact."""
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    log = folder / "train_seed3.log"

    def lower(match: re.Match[str]) -> str:
        return f"val_loss:{float(match[1]) * 0.99:.8f} val_bpb:{float(match[2]) * 0.99:.8f}"

    log.write_text(re.sub(r"val_loss:(\S+) val_bpb:(\S+)", lower, log.read_text()))
    record = verify.open_folder(folder)
    assert status_of(verify.check_folder(record), "BPB = nats") == verify.PASS
    subject = verify.open_subject(record, made().data, None)
    result = verify.check_rescored(subject, record.runs[0], record.artifacts[record.runs[0].path], exact=False)
    assert result.status == verify.FAIL and "BPB from the log" in result.detail
    (folder / "train_gpt.py").write_text("import lossless_caps\n" + (folder / "train_gpt.py").read_text())
    result = verify.check_rescored(subject, record.runs[1], record.artifacts[record.runs[1].path], exact=False)
    assert result.status == verify.FAIL and "did not end" in result.detail
