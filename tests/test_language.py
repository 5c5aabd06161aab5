"""Language modelling: who reads which token, the hidden state, perplexity, and the vocabulary."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sage.interfaces import Place, Seeds
from tasks.data import python_docs
from tasks.data.corpus import prepare
from tasks.data.text import EOS, PAD, SPECIALS, UNK, Text, build, read, save, tokenizer
from tasks.data.wikitext2 import WIKITEXT2
from tasks.language import NO_TARGET, LanguageModelling, LanguageSettings, evaluation_columns
from tasks.models.lstm import LanguageLSTM
from tasks.python_docs import PythonDocs, PythonDocsSettings

CPU = torch.device("cpu")
ONE = Place(0, 1)
DATA = Path("no data")


def numbered(num_train: int, num_held_out: int = 2, num_types: int | None = None) -> Text:
    """Token i is the number i, modulo the number of types where one is given."""
    lengths = (num_train, num_held_out, num_held_out)
    parts = [np.arange(length, dtype=np.int32) % (num_types or length) for length in lengths]
    return Text(*parts, vocabulary=np.array([str(i) for i in range(num_types or max(lengths))]))


def make_task(text: Text, batch: int = 1, place: Place = ONE, **changes: Any) -> LanguageModelling:
    """A small task in double precision on a given text."""

    class Given(LanguageModelling):
        @classmethod
        def read(cls, config: LanguageSettings, data: Path) -> Text:
            return text

    sizes = {"bptt": 3, "units": 6, "layers": 2, "dropout": 0.0} | changes
    settings = LanguageSettings(name="given", batch_per_worker=batch, **sizes)
    torch.manual_seed(0)
    task = Given(settings, DATA, place, seeds=Seeds.derive(1, place.rank), device=CPU)
    task.model.double()
    task.hidden = task.hidden.double()
    return task


def losses_of(task: LanguageModelling, epoch: int = 0, start: int = 0) -> list[float]:
    return [task.loss(batch).item() for batch in task.train_batches(epoch, start)]


# --- which token is where -------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_workers_columns_are_disjoint_and_together_the_single_workers(world_size: int) -> None:
    text = numbered(100)
    single = list(make_task(text, 2 * world_size).train_batches(0))
    tasks = [make_task(text, 2, Place(rank, world_size)) for rank in range(world_size)]
    assert {task.steps_per_epoch for task in tasks} == {len(single)}
    for step, whole in zip(zip(*(task.train_batches(0) for task in tasks), strict=True), single, strict=True):
        for index in range(2):
            assert torch.equal(torch.cat([batch[index] for batch in step], dim=1), whole[index])
    read = [n for task in tasks for _, targets in task.train_batches(0) for n in targets.flatten().tolist()]
    length = 100 // (2 * world_size)
    assert sorted(read) == [n for n in range(2 * world_size * length) if n % length]  # but a column's first


def test_an_epoch_by_hand() -> None:
    # 3 columns of 17 // 3 = 5 tokens: 0-4, 5-9, 10-14; 4 to predict in each, 3 and then 1 at a time.
    task = make_task(numbered(17), 3)
    assert task.steps_per_epoch == 2
    (first, first_targets), (last, last_targets) = task.train_batches(0)
    assert first.tolist() == [[0, 5, 10], [1, 6, 11], [2, 7, 12]]
    assert first_targets.tolist() == [[1, 6, 11], [2, 7, 12], [3, 8, 13]]
    assert (last.tolist(), last_targets.tolist()) == ([[3, 8, 13]], [[4, 9, 14]])
    assert {part.dtype for part in (first, first_targets, last, last_targets)} == {torch.int64}


def test_an_epoch_started_late_is_the_tail_of_the_whole_epoch() -> None:
    task = make_task(numbered(50), 4)
    whole = list(task.train_batches(0))
    assert len(whole) == 4
    for start in range(5):
        tail = list(task.train_batches(0, start))
        assert len(tail) == 4 - start
        assert all(
            torch.equal(x, y)
            for some, other in zip(tail, whole[start:], strict=True)
            for x, y in zip(some, other, strict=True)
        )


def test_only_the_first_train_tokens_are_trained_on() -> None:
    task = make_task(numbered(50, 20), 2, train_tokens=21)
    assert max(targets.max().item() for _, targets in task.train_batches(0)) == 19
    assert task.evaluate()["loss"][1] == 19


def test_batches_neither_follow_nor_move_the_global_generator() -> None:
    task = make_task(numbered(50), 4)
    first = [tokens.tolist() for tokens, _ in task.train_batches(0)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert [tokens.tolist() for tokens, _ in task.train_batches(1)] == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("batch", "world_size", "fits"), [(5, 2, True), (6, 2, False), (10, 1, True)])
def test_a_batch_that_leaves_a_column_nothing_to_predict_is_refused(
    batch: int, world_size: int, fits: bool
) -> None:
    task = make_task(numbered(21))
    settings = LanguageSettings(name="given", batch_per_worker=batch)
    if fits:
        task.check(settings, DATA, world_size)
        assert make_task(numbered(21), batch, Place(0, world_size)).steps_per_epoch == 1
    else:
        with pytest.raises(ValueError, match=r"^task\.batch_per_worker: expected at most 5 .*, got 6$"):
            task.check(settings, DATA, world_size)


# --- the hidden state -----------------------------------------------------------------------------


def unrolled(model: LanguageLSTM, columns: Tensor) -> Tensor:
    """Cross entropy (length - 1, B) of columns (length, B), in one pass from an empty context."""
    scores, _ = model(columns[:-1], model.first_hidden(columns.shape[1]))
    return F.cross_entropy(scores.transpose(1, 2), columns[1:], reduction="none")


def test_the_hidden_state_is_carried_through_an_epoch_and_reset_at_the_next() -> None:
    task = make_task(numbered(40, num_types=7), 4)  # columns of 10: 9 to predict, 3 at a time
    columns = (torch.arange(40) % 7).view(4, 10).t()
    expected = unrolled(task.model, columns).view(3, -1).mean(1).tolist()
    # Double precision: sums of some ten terms, in another order.
    assert losses_of(task) == pytest.approx(expected, rel=1e-12)
    assert task.hidden.abs().max() > 0
    assert losses_of(task, epoch=1) == pytest.approx(expected, rel=1e-12)


def test_gradients_do_not_reach_into_the_batch_before() -> None:
    task = make_task(numbered(40, num_types=7), 4)
    for batch in task.train_batches(0):
        loss = task.loss(batch)
        assert not task.hidden.requires_grad
        loss.backward()  # a second backward through a freed graph would raise


def test_the_state_restored_makes_an_epoch_go_on_as_if_never_interrupted() -> None:
    text = numbered(40, num_types=7)
    whole = losses_of(make_task(text, 4))
    interrupted, resumed = make_task(text, 4), make_task(text, 4)
    batches = interrupted.train_batches(0)
    for _ in range(2):
        interrupted.loss(next(batches))
    resumed.load_state_dict(interrupted.state_dict())
    assert losses_of(resumed, start=2) == whole[2:]
    assert losses_of(make_task(text, 4), start=2) != whole[2:]


def test_the_hidden_state_keeps_its_type_if_the_model_returns_another() -> None:
    task = make_task(numbered(40, num_types=7), 4)
    task.model.register_forward_hook(lambda model, given, found: (found[0], found[1].bfloat16()))
    losses_of(task)
    assert task.hidden.dtype == torch.float64
    assert task.hidden.abs().max() > 0


def has_bfloat16_lstm() -> bool:
    """Whether the processor does: oneDNN wants AVX-512 for one, and PyTorch's autocast asks for it anyway."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):
            raise
        return False
    return True


@pytest.mark.skipif(not has_bfloat16_lstm(), reason="oneDNN has no bfloat16 LSTM for this processor")
def test_the_hidden_state_keeps_its_type_under_autocast() -> None:
    task = make_task(numbered(40, num_types=7), 4)
    task.model.float()
    task.hidden = task.hidden.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(task)
    assert task.hidden.dtype == torch.float32
    assert all(map(math.isfinite, losses))


# --- perplexity -----------------------------------------------------------------------------------


def with_known_probabilities(valid: list[int], test: list[int], place: Place) -> LanguageModelling:
    """A task whose model gives types 0, 1, 2 the probabilities 1/2, 1/4, 1/4, whatever went before."""
    parts = (np.array(part, np.int32) for part in ([0, 1, 2] * 2, valid, test))
    task = make_task(Text(*parts, vocabulary=np.array(["a", "b", "c"])), place=place)
    with torch.no_grad():
        task.model.embedding.weight.zero_()
        task.model.decoder.bias.copy_(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log())
    return task


def perplexity(tasks: list[LanguageModelling], at_end: bool = False) -> float:
    """Over all workers, as the loop puts their sums and counts together."""
    found = [(task.evaluate_at_end() if at_end else task.evaluate())["loss"] for task in tasks]
    total, count = (sum(part) for part in zip(*found, strict=True))
    return tasks[0].derive({"loss": total / count})["perplexity"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_perplexity_is_the_number_worked_by_hand(world_size: int) -> None:
    # Predicted are 0 0 1 2 0: bits 1 1 2 2 1, 7/5 a token (the mean over workers of their own perplexities,
    # or of each token's, would be another); in the test text 1 2 1, bits 2 2 2.
    tasks = [
        with_known_probabilities([2, 0, 0, 1, 2, 0], [0, 1, 2, 1], Place(rank, world_size))
        for rank in range(world_size)
    ]
    assert perplexity(tasks) == pytest.approx(2 ** (7 / 5), rel=1e-12)
    assert perplexity(tasks, at_end=True) == pytest.approx(4.0, rel=1e-12)
    task = tasks[0]
    assert (task.score, task.higher_is_better, task.evaluated) == ("perplexity", False, "valid")
    assert task.derive({"loss": 1000.0})["perplexity"] == math.inf


@pytest.mark.parametrize("num_tokens", [2, 3, 64, 65, 66, 200, 1000])
def test_each_token_but_the_first_is_predicted_once_at_3_workers_from_the_one_before(num_tokens: int) -> None:
    numbers = np.arange(num_tokens, dtype=np.int32)
    pairs, counts = [], []
    for rank in range(3):
        tokens, targets = evaluation_columns(numbers, Place(rank, 3))
        real = targets != NO_TARGET
        pairs += zip(tokens[real].tolist(), targets[real].tolist(), strict=True)
        counts.append(make_task(numbered(6, num_tokens), place=Place(rank, 3)).evaluate()["loss"][1])
    assert sorted(pairs) == [(i, i + 1) for i in range(num_tokens - 1)]
    assert sum(counts) == num_tokens - 1


@pytest.mark.parametrize("world_size", [2, 3, 70])
def test_the_world_size_does_not_change_the_perplexity(world_size: int) -> None:
    text = numbered(300, 500, num_types=11)
    single = perplexity([make_task(text)])
    several = perplexity([make_task(text, place=Place(rank, world_size)) for rank in range(world_size)])
    assert several == pytest.approx(single, rel=1e-12)  # double precision, sums of 500 terms


def test_the_context_is_carried_along_an_evaluated_column() -> None:
    task = make_task(numbered(2, 64 * 9 + 1, num_types=11))  # 64 columns with 9 to predict in each
    tokens = torch.arange(64 * 9 + 1) % 11
    columns = torch.cat((tokens[:-1].view(64, 9), tokens[9::9, None]), dim=1).t()  # (10, 64)
    total, count = task.evaluate()["loss"]
    assert (total, count) == (pytest.approx(unrolled(task.model, columns).sum().item(), rel=1e-12), 576.0)


def test_evaluating_uses_no_dropout_and_leaves_training_as_it_was() -> None:
    task = make_task(numbered(40, 50, num_types=7), 4, dropout=0.5)
    without = make_task(numbered(40, 50, num_types=7), 4)
    batches = task.train_batches(0)
    task.loss(next(batches))
    hidden, state = task.hidden.clone(), torch.get_rng_state()
    assert task.evaluate() == without.evaluate()
    assert torch.equal(task.hidden, hidden)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    assert losses_of(task) != losses_of(without)


def test_an_untrained_model_is_about_as_perplexed_as_there_are_types() -> None:
    settings = PythonDocsSettings(batch_per_worker=8, units=64, layers=1)
    torch.manual_seed(0)
    task = PythonDocs(settings, DATA, ONE, seeds=Seeds.derive(1, 0), device=CPU)
    # Scores are sums of 64 products of numbers below 0.1 and 1: of a few hundredths, as their spread's half
    # square is what the logarithm is off by.
    assert perplexity([task]) == pytest.approx(task.model.embedding.num_embeddings, rel=0.02)


# --- the model ------------------------------------------------------------------------------------


def test_the_published_model_has_28949319_parameters() -> None:
    settings = LanguageSettings(name="given")
    with torch.device("meta"):
        model = LanguageLSTM(28_869, settings.units, settings.layers, settings.dropout)
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_949_319


def test_the_first_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    model = LanguageLSTM(500, 40, 2, 0.4)
    assert model.decoder.weight is model.embedding.weight
    low, high = model.embedding.weight.aminmax()
    # 20,000 uniform draws: none in the outermost hundredth of the range has probability 0.995^20000.
    assert -0.1 <= low < -0.099
    assert 0.099 < high <= 0.1
    assert not model.decoder.bias.any()
    for parameter in model.lstm.parameters():  # torch's default: uniform within 1 / sqrt(units)
        assert 0.9 / math.sqrt(40) < parameter.abs().max() <= 1 / math.sqrt(40)


def test_layers_of_their_own_are_torchs_lstm_with_dropout_bit_for_bit() -> None:
    """Weights and dropout masks too: dropout after the embedding, between the layers, after the last."""
    torch.manual_seed(0)
    model = LanguageLSTM(5, 4, 3, 0.4)
    torch.manual_seed(0)
    embedding, reference = torch.nn.Embedding(5, 4), torch.nn.LSTM(4, 4, 3, dropout=0.4)
    embedding.weight = model.embedding.weight
    tokens, hidden = torch.tensor([[0, 3], [1, 4], [2, 0]]), torch.randn(2, 3, 2, 4)
    torch.manual_seed(1)
    scores, after = model(tokens, hidden)
    torch.manual_seed(1)
    outputs, ends = reference(F.dropout(embedding(tokens), 0.4), (hidden[0], hidden[1]))
    assert torch.equal(scores, model.decoder(F.dropout(outputs, 0.4)))
    assert torch.equal(after, torch.stack(ends))
    named = zip(model.lstm.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in named)


# --- numbering ------------------------------------------------------------------------------------


def test_the_vocabulary_and_the_numbers_by_hand() -> None:
    parts = {"train": ["b a b", "a c"], "valid": ["c d"], "test": ["", "a"]}
    text = build(parts, str.split, (UNK, PAD))
    # The specials; then by count (<eos>, a and b twice, c once), equal counts by the alphabet.
    assert text.vocabulary.tolist() == [UNK, PAD, EOS, "a", "b", "c"]
    assert text.train.tolist() == [4, 3, 4, 2, 3, 5, 2]
    assert text.valid.tolist() == [5, 0, 2]
    assert text.test.tolist() == [2, 3, 2]
    assert {part.dtype for part in (text.train, text.valid, text.test)} == {np.dtype(np.int32)}
    rare = build(parts, str.split, (UNK,), min_frequency=2)
    assert rare.vocabulary.tolist() == [UNK, EOS, "a", "b"]
    assert rare.train.tolist() == [3, 2, 3, 1, 2, 0, 1]


def test_spacys_tokens_are_lower_case_and_the_special_ones_in_one_piece() -> None:
    tokens = tokenizer("spacy")("The <unk> said: don't <eos> U.S. <bos>, <pad>")
    special = ["<unk>", "said", ":", "do", "n't", "<eos>", "u.s.", "<bos>", ","]
    assert tokens == ["the", *special, "<", "pad", ">"]
    assert tokenizer("whitespace")(" The <unk>, \n") == ["The", "<unk>,"]


HARD_LINES = [
    "",
    " ",
    "  a  b ",
    "a\tb \t c\u00a0d \u2003 e",
    "\n a \n",
    " = Title = \n",
    "Don't can't we'll 10am 5 p.m. e.g. U.S. Mr. O'Neil's (U.K.) \"so-called\" end.",
    "<unk>,<unk> < unk > <eos>? x<bos>y",
    ":) :( ;-) : ( (: <3 xD ^_^ o.0 ...a.b,c",
    "http://a.b/c?d=e. me@x.org, $5.30-$6 10km 3,4 a--b c/d ...",
    "'s 's. cannot gonna' C++ 12:30 @-@ @,@ 1 @.@ 5",
    "\u4e2d\u6587 \u00e9t\u00e9 \u201cx\u201d\u2014y\u3000 z  ",
]


def test_a_line_is_cut_as_spacy_cuts_it_in_one_piece() -> None:
    import spacy

    whole, ours = spacy.blank("en").tokenizer, tokenizer("spacy")
    for word in ("<unk>", "<eos>", "<bos>"):
        whole.add_special_case(word, [{spacy.symbols.ORTH: word}])
    for line in [*HARD_LINES, *python_docs.paragraphs()["valid"]]:
        assert ours(line) == [token.text.lower() for token in whole(line)]


def test_a_prepared_text_is_read_as_it_was_saved(tmp_path: Path) -> None:
    text = build({"train": ["ä b"], "valid": ["b"], "test": ["c"]}, str.split, (UNK,))
    save(tmp_path / "text.npz", text)
    found = read(tmp_path / "text.npz", "make it")
    for name, values in vars(text).items():
        assert np.array_equal(getattr(found, name), values)
        assert getattr(found, name).dtype == values.dtype


WHOLE = {"train": [0, 1, 2], "valid": [1, 1], "test": [2, 0]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"valid": np.array([1, 3], np.int32)}, r"numbers of valid in \[0, 3\), .* got 1 to 3"),
        ({"test": np.array([-1, 0], np.int32)}, r"numbers of test in \[0, 3\), .* got -1 to 0"),
        (
            {"train": np.array([0, 1, 2])},
            r"expected train as int32 \(tokens,\), at least 2, got int64 \(3,\)",
        ),
        ({"train": np.array([1], np.int32)}, r"expected train as int32 .*, got int32 \(1,\)"),
        ({"train": np.array([[1, 1]], np.int32)}, r"expected train as int32 .*, got int32 \(1, 2\)"),
        ({"vocabulary": np.arange(3)}, r"expected vocabulary as texts \(types,\), got int64 \(3,\)"),
        (
            {"vocabulary": np.array(["a", "b", "c", "d"])},
            r"numbers of train up to 3, .* got up to 2; the vocabulary is another text's",
        ),
        ({"vocabulary": None}, r"expected the arrays train, .*; vocabulary is missing"),
        ({"test": None, "valid": None}, r"expected the arrays train, .*; valid, test is missing"),
    ],
)
def test_a_prepared_text_that_does_not_fit_together_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, np.ndarray | None], told: str
) -> None:
    file = tmp_path / "text.npz"
    arrays = {name: np.array(numbers, np.int32) for name, numbers in WHOLE.items()}
    arrays |= {"vocabulary": np.array(["a", "b", "c"])}
    np.savez(file, **{name: values for name, values in (arrays | change).items() if values is not None})
    with pytest.raises(ValueError, match=told) as refused:
        read(file, "make it")
    assert str(refused.value).startswith(f"{file}: ")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"torn"])
def test_a_missing_or_damaged_prepared_file_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "text.npz"
    if content is not None:
        save(file, numbered(1000))
        file.write_bytes(file.read_bytes()[:-100] if content == b"torn" else content)
    told = "there is no such file; make it with: make it" if content is None else "it cannot be read"
    with pytest.raises(ValueError, match=told) as refused:
        read(file, "make it")
    assert str(refused.value).startswith(f"{file}: ")
    assert len(str(refused.value).splitlines()) == 1


def test_python_docs_are_the_same_at_every_call_and_no_paragraph_is_in_two_parts() -> None:
    text, again = python_docs.read(), python_docs.read()
    for name, values in vars(text).items():
        assert np.array_equal(values, getattr(again, name))
    assert len(text.train) > 50_000
    assert all(5_000 < len(part) < len(text.train) / 5 for part in (text.valid, text.test))
    for part, lines in python_docs.paragraphs().items():
        assert (getattr(text, part) == text.vocabulary.tolist().index(EOS)).sum() == len(lines)
    every = [line for lines in python_docs.paragraphs().values() for line in lines]
    assert len(every) == len(set(every))


@pytest.mark.realdata
def test_wikitext2_has_28869_types_by_spacy_and_33278_of_its_own(tmp_path: Path) -> None:
    source = Path(os.environ.get("SAGE_DATA", "")) / "wikitext-2"
    if "SAGE_DATA" not in os.environ or not source.is_dir():
        pytest.skip("needs SAGE_DATA, a folder with wikitext-2/train.txt, valid.txt, test.txt")
    prepare(tmp_path, source, WIKITEXT2)
    sizes = {name: len(WIKITEXT2.read(tmp_path, name).vocabulary) for name in SPECIALS}
    assert sizes == {"spacy": 28_869, "whitespace": 33_278}
    own = WIKITEXT2.read(tmp_path, "whitespace")
    assert [len(part) for part in (own.train, own.valid, own.test)] == [2_088_628, 217_646, 245_569]
    words = (source / "test.txt").read_text(encoding="utf-8").split("\n")[:-1]
    expected = [word for line in words for word in (*line.split(), EOS)]
    assert own.vocabulary[own.test].tolist() == expected
