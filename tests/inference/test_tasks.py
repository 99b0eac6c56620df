"""Each task gives what transformers gives alone, whatever the batch; what cannot work is refused."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, pipeline

from lib.config.cli import dump_config
from lib.config.predict import GenerateConfig
from lib.config.sections import DataConfig
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.inference.generation import language_settings, length_settings
from lib.inference.inputs import Example
from lib.inference.tasks import TruncationCounter, is_truncated
from tests import tiny_models
from tests.conftest import sentences, write_csv
from tests.predicting import answers, lines_file

TEXTS = [text for text, _ in sentences(11)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("classifier", "entailer", "masked", "tagger", "decoder", "bart", "t5"):
        getattr(tiny_models, name)(folder / name)
    return folder


# ---------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_classification_equals_the_pipeline_for_any_batch_size(models, batch_size):
    found = answers(*TEXTS, "--model", models / "classifier", "--per_device_eval_batch_size", batch_size)
    assert [row["text"] for row in found] == TEXTS
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    pipe = pipeline("text-classification", model=str(models / "classifier"))
    for row, wanted in zip(found, pipe(TEXTS), strict=True):
        assert row["label"] == wanted["label"]
        assert list(row["probabilities"]) == ["bad", "good", "mixed"]
        assert row["probabilities"][row["label"]] == pytest.approx(wanted["score"], abs=1e-5)
    assert len({row["label"] for row in found}) > 1


def test_classification_of_pairs_equals_the_pipeline(models, tmp_path):
    pairs = list(itertools.pairwise(TEXTS))
    file = write_csv(tmp_path / "pairs.csv", pairs, ("sentence1", "sentence2"))
    found = answers("--input", file, "--model", models / "classifier")
    pipe = pipeline("text-classification", model=str(models / "classifier"))
    wanted = pipe([{"text": a, "text_pair": b} for a, b in pairs])
    assert [row["text"] for row in found] == [list(pair) for pair in pairs]
    for row, item in zip(found, wanted, strict=True):
        assert row["probabilities"][item["label"]] == pytest.approx(item["score"], abs=1e-5)


def test_top_k_keeps_the_likeliest_labels(models):
    every = answers(*TEXTS, "--model", models / "classifier")
    best = answers(*TEXTS, "--model", models / "classifier", "--top_k", 2)
    for row, kept in zip(every, best, strict=True):
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        assert list(kept["probabilities"].items()) == ranked[:2]


def test_softmax_of_the_logits_gives_the_probabilities(models):
    plain = answers(*TEXTS, "--model", models / "classifier")
    logits = answers(*TEXTS, "--model", models / "classifier", "--function_to_apply", "none")
    for a, b in zip(plain, logits, strict=True):
        shares = torch.tensor(list(b["logits"].values())).softmax(0).tolist()
        assert list(a["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
        assert "probabilities" not in b


def test_multi_label_gives_labels_above_one_half(tmp_path):
    folder = tiny_models.classifier(tmp_path / "multi_label", problem_type="multi_label_classification")
    probabilities, logits = (
        answers(*TEXTS, "--model", folder, *flags) for flags in ([], ["--function_to_apply", "none"])
    )
    for row in probabilities:
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        assert row["labels"] == [name for name, p in ranked if p >= 0.5]
    assert [row["labels"] for row in probabilities] == [row["labels"] for row in logits]


def test_regression_gives_a_score(tmp_path):
    settings = {"problem_type": "regression", "num_labels": 1, **tiny_models.labels(["stars"])}
    (row,) = answers("a film", "--model", tiny_models.classifier(tmp_path / "regression", **settings))
    assert set(row) == {"id", "text", "score"}


def test_batch_does_not_change_the_classes_of_a_decoder(tmp_path):
    folder = tiny_models.deciding_decoder(tmp_path / "decoder")
    together = answers(*TEXTS, "--model", folder)
    alone = answers(*TEXTS, "--model", folder, "--per_device_eval_batch_size", 1)
    for a, b in zip(together, alone, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_run_sets_max_length_and_text_columns(tmp_path):
    """Otherwise the probabilities would not be those of eval.py."""
    run = tmp_path / "outputs" / "run"
    tiny_models.classifier(run / "model")
    options = DataConfig(train_file="t.csv", text_columns=("story",), max_length=5)
    (run / "config.yaml").write_text(dump_config(TrainConfig(data=options)), encoding="utf-8")
    rows = [(text, "the film was dull") for text in TEXTS]
    file = write_csv(tmp_path / "t.csv", rows, ("story", "text"))
    found = answers("--input", file, "--model", run)
    assert [row["text"] for row in found] == TEXTS
    pipe = pipeline("text-classification", model=str(run / "model"))
    for row, item in zip(found, pipe(TEXTS, truncation=True, max_length=5), strict=True):
        assert row["probabilities"][item["label"]] == pytest.approx(item["score"], abs=1e-5)
    longer = answers("--input", file, "--model", run, "--max_length", 60)
    assert any(a["probabilities"] != b["probabilities"] for a, b in zip(found, longer, strict=True))


def test_text_is_truncated_to_the_position_embeddings(tmp_path):
    """The tokenizers of many models have no limit of their own."""
    folder = tiny_models.classifier(tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    (row,) = answers("a film " * 200, "--model", folder)
    (truncated,) = answers("a film " * 200, "--model", folder, "--max_length", 78)
    assert row["probabilities"] == truncated["probabilities"]


def test_truncated_texts_are_counted(models):
    """Exactly those that the tokenizer truncates: texts and pairs around the limit, and words of one and of no token."""
    tokenizer = AutoTokenizer.from_pretrained(models / "classifier")
    tokenizer.model_max_length = 8
    texts = [" ".join(["film"] * n) for n in range(12)] + ["é" * 40, ""]
    for rows in ([(text,) for text in texts], [(text, "a plot") for text in texts]):
        whole = [len(tokenizer(*row)["input_ids"]) for row in rows]
        kept = [len(tokenizer(*row, truncation=True)["input_ids"]) for row in rows]
        assert [is_truncated(tokenizer, row) for row in rows] == [a > b for a, b in zip(whole, kept, strict=True)]
    counter = TruncationCounter(tokenizer, lambda example: example.texts)
    passed = [(Example(n, n, (text,)), {}) for n, text in enumerate(texts)]
    assert list(counter.watch(iter(passed))) == passed
    assert (counter.truncated, counter.seen) == (5, 14)
    assert "5 of 14 texts (35.7%)" in str(counter)


# ---------------------------------------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_classification_equals_the_pipeline(models, multi_label):
    names = ["film", "actor", "plot"]
    flags = ["--task", "zero-shot-classification", "--model", models / "entailer", "--multi_label", multi_label]
    found = answers(*TEXTS, *flags, "--candidate_labels", *names, "--per_device_eval_batch_size", 4)
    pipe = pipeline("zero-shot-classification", model=str(models / "entailer"))
    for row, item in zip(found, pipe(TEXTS, names, multi_label=multi_label), strict=True):
        assert row["label"] == item["labels"][0]
        assert list(row["probabilities"]) == item["labels"]
        assert list(row["probabilities"].values()) == pytest.approx(item["scores"], abs=1e-5)


def test_fill_mask_equals_the_pipeline(models):
    texts = [f"{text} <mask>" for text in TEXTS] + ["a <mask> film <mask>"]
    found = answers(*texts, "--task", "fill-mask", "--model", models / "masked", "--top_k", 2)
    pipe = pipeline("fill-mask", model=str(models / "masked"))
    for row, wanted in zip(found[:-1], pipe(texts[:-1], top_k=2), strict=True):
        assert [item["token_str"] for item in row["answers"]] == [item["token_str"] for item in wanted]
        assert [item["score"] for item in row["answers"]] == pytest.approx([item["score"] for item in wanted], abs=1e-5)
    assert [len(fillings) for fillings in found[-1]["answers"]] == [2, 2]


def test_masks_of_both_model_families_are_understood(models):
    flags = ["--task", "fill-mask", "--model", models / "masked"]
    assert answers("a <mask> film", *flags)[0]["answers"] == answers("a [MASK] film", *flags)[0]["answers"]
    assert len(answers("a <mask> film", *flags)[0]["answers"]) == 5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ner_equals_the_pipeline_for_long_texts_too(models, batch_size):
    texts = [*TEXTS, " ".join(TEXTS)]
    flags = ["--task", "ner", "--model", models / "tagger", "--stride", 8, "--per_device_eval_batch_size", batch_size]
    found = answers(*texts, *flags)
    pipe = pipeline("ner", model=str(models / "tagger"), aggregation_strategy="simple", stride=8)
    for row, wanted in zip(found, [pipe(text) for text in texts], strict=True):
        assert [item["word"] for item in row["entities"]] == [item["word"] for item in wanted]
        assert [item["score"] for item in row["entities"]] == pytest.approx([i["score"] for i in wanted], abs=1e-5)
    assert found[-1]["entities"][-1]["end"] > 300
    tokens = answers(*texts, *flags, "--aggregation_strategy", "none")
    assert {"entity", "index"} <= set(tokens[0]["entities"][0])


# ---------------------------------------------------------------------------------------------------- generation


def test_text_generation_equals_generate(models):
    found = answers(*TEXTS, "", "--task", "text-generation", "--model", models / "decoder", "--max_new_tokens", 6)
    tokenizer = AutoTokenizer.from_pretrained(models / "decoder")
    model = AutoModelForCausalLM.from_pretrained(models / "decoder")
    for row in found[:-1]:
        ids = tokenizer(row["text"], return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["generated_text"] == row["text"] + tokenizer.decode(new, skip_special_tokens=True)
    assert found[-1]["text"] == ""


def test_long_prompt_is_truncated_at_its_beginning(models):
    flags = ["--task", "text-generation", "--model", models / "decoder", "--max_new_tokens", 6]
    ends = ["a film was", "the story felt great", "not a good actor"]
    whole = answers(*("dull " * 100 + end for end in ends), *flags)
    # Of 64 positions 6 are for new tokens and 2 for special tokens.
    tails = answers(*("dull " * (56 - len(end.split())) + end for end in ends), *flags)
    new = [row["generated_text"][len(row["text"]) :] for row in whole]
    assert new == [row["generated_text"][len(row["text"]) :] for row in tails]
    assert len(set(new)) > 1


def test_sampling_depends_on_the_seed_alone(models):
    flags = ["--task", "text-generation", "--model", models / "decoder", "--generate_kwargs", "do_sample=True"]
    first, again = answers(*TEXTS, *flags), answers(*TEXTS, *flags)
    assert first == again != answers(*TEXTS, *flags, "--seed", 7)


@pytest.mark.parametrize(
    ("task", "model", "prefix", "key"),
    [
        ("summarization", "bart", "", "summary_text"),
        ("translation", "bart", "", "translation_text"),
        ("summarization", "t5", "the plot was ", "summary_text"),
        ("translation", "t5", "the actor felt ", "translation_text"),
    ],
)
def test_summarization_and_translation_equal_generate(models, task, model, prefix, key):
    flags = ["--task", task, "--model", models / model, "--max_new_tokens", 6, "--num_beams", 2]
    languages = ["--source_lang", "en", "--target_lang", "fr"] if prefix and task == "translation" else []
    found = answers(*TEXTS, *flags, *languages, "--top_k", 2, "--per_device_eval_batch_size", 4)
    tokenizer = AutoTokenizer.from_pretrained(models / model)
    writer = AutoModelForSeq2SeqLM.from_pretrained(models / model)
    for row in found:
        ids = tokenizer(prefix + row["text"], return_tensors="pt")
        wanted = writer.generate(**ids, max_new_tokens=6, num_beams=2, num_return_sequences=2)
        assert row["answers"] == [text.strip() for text in tokenizer.batch_decode(wanted, skip_special_tokens=True)]
        assert row[key] == row["answers"][0]
    assert len({row[key] for row in found}) > 1


@pytest.mark.parametrize(
    ("is_seq2seq", "defaults", "positions", "asked", "wanted"),
    [
        (True, {"max_length": 142}, 1024, None, {}),  # BART for summarization
        (True, {}, 1024, None, {"max_new_tokens": 256}),
        (True, {}, 80, None, {"max_new_tokens": 79}),
        (True, {}, None, None, {"max_new_tokens": 256}),  # T5 has no position embeddings
        (True, {"max_length": 142}, 1024, 9, {"max_new_tokens": 9}),
        (False, {}, 64, None, {"max_new_tokens": 32}),  # a decoder's prompt needs positions too
        (False, {"max_new_tokens": 20}, 64, None, {"max_new_tokens": 20}),
    ],
)
def test_length_is_the_option_else_the_default_of_the_model_else_256(is_seq2seq, defaults, positions, asked, wanted):
    config = SimpleNamespace(is_encoder_decoder=is_seq2seq, max_position_embeddings=positions)
    model = SimpleNamespace(config=config, generation_config=GenerationConfig(**defaults))
    assert length_settings(model, asked) == wanted


class ManyLanguages:
    """What the tokenizers of mBART, NLLB and M2M100 have in common."""

    src_lang, unk_token_id = "en_XX", 3

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"en_XX": 11, "fr_XX": 12}.get(token, 3)


def test_languages_are_set_in_tokenizer_and_generate():
    tokenizer = ManyLanguages()
    config = GenerateConfig(source_lang="fr_XX", target_lang="en_XX")
    assert language_settings(tokenizer, config) == {"forced_bos_token_id": 11}
    assert tokenizer.src_lang == "fr_XX"
    with pytest.raises(UserError, match=r"no language klingon.*such as fr_XX"):
        language_settings(tokenizer, GenerateConfig(source_lang="fr_XX", target_lang="klingon"))
    with pytest.raises(UserError, match="name both with --source_lang and --target_lang"):
        language_settings(tokenizer, GenerateConfig(source_lang="fr_XX"))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "./classifier", "--task", "question-answering", "--question", "a", "--context", "b"],
            "qa_outputs",
        ),
        (["a", "--model", "minilm"], r"not a trained classifier.*classifier\.weight"),
        (["a", "--model", "bart", "--task", "fill-mask"], "row 1 has no <mask>"),
        (["a " * 90 + "<mask>", "--model", "masked", "--task", "fill-mask"], "beyond the 64 tokens"),
        (["a", "--model", "masked", "--task", "summarization"], "could not be loaded: transformers has no model"),
        (["a", "--model", "t5", "--task", "translation"], "translates en to fr; name one of them"),
        (["a", "--model", "decoder", "--task", "text-generation", "--max_new_tokens", 64], "has room for 63"),
        (
            ["a", "--model", "bart", "--task", "summarization", "--generate_kwargs", "beams=2"],
            "beams: `generate` has no",
        ),
        (
            [
                "a",
                "--model",
                "bart",
                "--task",
                "summarization",
                "--generate_kwargs",
                "temperature=-1",
                "do_sample=True",
            ],
            "--generate_kwargs temperature=-1 do_sample=True: .*temperature",
        ),
        (["a", "--model", "./absent"], "no such folder"),
        (["a", "--model", "classifier", "--max_length", 2], "no room for text besides 2 special tokens"),
    ],
)
def test_impossible_requests_are_user_errors(models, monkeypatch, flags, message):
    monkeypatch.chdir(models)
    with pytest.raises(UserError, match=f"(?s){message}"):
        answers(*flags)


def test_zero_shot_classification_needs_an_nli_model(models):
    with pytest.raises(UserError, match=r"not trained on entailment \(its classes: bad, good, mixed\)"):
        answers("a", "--model", models / "classifier", "--task", "zero-shot-classification", "--candidate_labels", "x")


def test_fill_mask_needs_a_mask_token(tmp_path):
    folder = tiny_models.masked(tmp_path / "unmasked")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its tokenizer has no mask"):
        answers("a <mask>", "--task", "fill-mask", "--model", folder)


def test_run_without_a_model_is_a_user_error(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(TrainConfig()), encoding="utf-8")
    with pytest.raises(UserError, match="no model folder yet"):
        answers("a", "--model", tmp_path)


def test_txt_file_gets_a_prediction_per_line(models, tmp_path):
    found = answers("--input", lines_file(tmp_path / "t.txt", ["a film", "", "dull"]), "--model", models / "classifier")
    assert [(row["id"], row["text"]) for row in found] == [(0, "a film"), (1, ""), (2, "dull")]
