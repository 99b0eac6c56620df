"""Each task of predict.py answers as the library does on its own, whatever the batch; what cannot work is refused."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, pipeline

from lib.config.cli import save_config
from lib.config.predict import GenerateConfig
from lib.config.sections import DataConfig
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.inference.generation import language_settings, length_settings
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
def test_a_classifier_answers_as_the_pipeline_does_in_any_batch(models, batch_size):
    found = answers(*TEXTS, "--model", models / "classifier", "--per_device_eval_batch_size", batch_size)
    assert [row["text"] for row in found] == TEXTS
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    for row, wanted in zip(
        found, pipeline("text-classification", model=str(models / "classifier"))(TEXTS), strict=True
    ):
        assert row["label"] == wanted["label"]
        assert list(row["probabilities"]) == ["bad", "good", "mixed"]
        assert row["probabilities"][row["label"]] == pytest.approx(wanted["score"], abs=1e-5)
    assert len({row["label"] for row in found}) > 1


def test_pairs_are_answered_as_the_pipeline_does(models, tmp_path):
    pairs = list(itertools.pairwise(TEXTS))
    file = write_csv(tmp_path / "pairs.csv", pairs, ("sentence1", "sentence2"))
    found = answers("--input", file, "--model", models / "classifier")
    pipe = pipeline("text-classification", model=str(models / "classifier"))
    wanted = pipe([{"text": a, "text_pair": b} for a, b in pairs])
    assert [row["text"] for row in found] == [list(pair) for pair in pairs]
    for row, item in zip(found, wanted, strict=True):
        assert row["probabilities"][item["label"]] == pytest.approx(item["score"], abs=1e-5)


def test_the_likeliest_labels_come_first_and_no_others(models):
    every = answers(*TEXTS, "--model", models / "classifier")
    best = answers(*TEXTS, "--model", models / "classifier", "--top_k", 2)
    for row, kept in zip(every, best, strict=True):
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        assert list(kept["probabilities"].items()) == ranked[:2]


def test_logits_are_what_the_probabilities_are_made_of(models):
    plain = answers(*TEXTS, "--model", models / "classifier")
    logits = answers(*TEXTS, "--model", models / "classifier", "--function_to_apply", "none")
    for a, b in zip(plain, logits, strict=True):
        shares = torch.tensor(list(b["logits"].values())).softmax(0).tolist()
        assert list(a["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
        assert "probabilities" not in b


def test_several_labels_and_ratings_have_words_of_their_own(tmp_path):
    several = tiny_models.classifier(tmp_path / "several", problem_type="multi_label_classification")
    rating = tiny_models.classifier(
        tmp_path / "rating", problem_type="regression", num_labels=1, **tiny_models.labels({0: "stars"})
    )
    for row in answers(*TEXTS, "--model", several):
        assert row["labels"] == [
            name for name, p in sorted(row["probabilities"].items(), key=lambda item: -item[1]) if p >= 0.5
        ]
    probabilities, logits = (
        answers(*TEXTS, "--model", several, *flags) for flags in ([], ["--function_to_apply", "none"])
    )
    assert [row["labels"] for row in probabilities] == [row["labels"] for row in logits]
    (row,) = answers("a film", "--model", rating)
    assert set(row) == {"id", "text", "score"}


def test_a_decoder_classifies_texts_of_different_length_together(tmp_path):
    folder = tiny_models.deciding_decoder(tmp_path / "decoder")
    together = answers(*TEXTS, "--model", folder)
    alone = answers(*TEXTS, "--model", folder, "--per_device_eval_batch_size", 1)
    for a, b in zip(together, alone, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_a_run_brings_the_length_and_the_columns_it_was_trained_with(tmp_path):
    """Texts cut elsewhere than in training would get other probabilities than eval.py gives them."""
    run = tmp_path / "outputs" / "run"
    tiny_models.classifier(run / "model")
    save_config(
        TrainConfig(data=DataConfig(train_file="t.csv", text_columns=("story",), max_length=5)), run / "config.yaml"
    )
    rows = [(text, "the film was dull") for text in TEXTS]
    file = write_csv(tmp_path / "t.csv", rows, ("story", "text"))
    found = answers("--input", file, "--model", run)
    assert [row["text"] for row in found] == TEXTS
    pipe = pipeline("text-classification", model=str(run / "model"))
    for row, item in zip(found, pipe(TEXTS, truncation=True, max_length=5), strict=True):
        assert row["probabilities"][item["label"]] == pytest.approx(item["score"], abs=1e-5)
    longer = answers("--input", file, "--model", run, "--max_length", 60)
    assert any(a["probabilities"] != b["probabilities"] for a, b in zip(found, longer, strict=True))


def test_a_text_longer_than_the_model_is_cut_to_its_positions(models, tmp_path):
    """The tokenizer of many models names no limit; the table of positions is one."""
    folder = tiny_models.classifier(tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    (row,) = answers("a film " * 200, "--model", folder)
    (cut,) = answers("a film " * 200, "--model", folder, "--max_length", 78)
    assert row["probabilities"] == cut["probabilities"]


# ---------------------------------------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("multi_label", [False, True])
def test_candidate_labels_are_chosen_from_as_in_the_pipeline(models, multi_label):
    names = ["film", "actor", "plot"]
    flags = ["--task", "zero-shot-classification", "--model", models / "entailer", "--multi_label", multi_label]
    found = answers(*TEXTS, *flags, "--candidate_labels", *names, "--per_device_eval_batch_size", 4)
    pipe = pipeline("zero-shot-classification", model=str(models / "entailer"))
    for row, item in zip(found, pipe(TEXTS, names, multi_label=multi_label), strict=True):
        assert row["label"] == item["labels"][0]
        assert list(row["probabilities"]) == item["labels"]
        assert list(row["probabilities"].values()) == pytest.approx(item["scores"], abs=1e-5)


def test_masks_are_filled_as_in_the_pipeline(models):
    texts = [f"{text} <mask>" for text in TEXTS] + ["a <mask> film <mask>"]
    found = answers(*texts, "--task", "fill-mask", "--model", models / "masked", "--top_k", 2)
    pipe = pipeline("fill-mask", model=str(models / "masked"))
    for row, wanted in zip(found[:-1], pipe(texts[:-1], top_k=2), strict=True):
        assert [item["token_str"] for item in row["answers"]] == [item["token_str"] for item in wanted]
        assert [item["score"] for item in row["answers"]] == pytest.approx([item["score"] for item in wanted], abs=1e-5)
    assert [len(fillings) for fillings in found[-1]["answers"]] == [2, 2]


def test_the_mask_of_another_model_family_is_understood(models):
    flags = ["--task", "fill-mask", "--model", models / "masked"]
    assert answers("a <mask> film", *flags)[0]["answers"] == answers("a [MASK] film", *flags)[0]["answers"]
    assert len(answers("a <mask> film", *flags)[0]["answers"]) == 5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_entities_are_those_of_the_pipeline_also_past_the_length_of_the_model(models, batch_size):
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


def test_a_text_is_continued_as_by_generate_alone(models):
    found = answers(*TEXTS, "", "--task", "text-generation", "--model", models / "decoder", "--max_new_tokens", 6)
    tokenizer = AutoTokenizer.from_pretrained(models / "decoder")
    model = AutoModelForCausalLM.from_pretrained(models / "decoder")
    for row in found[:-1]:
        ids = tokenizer(row["text"], return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["generated_text"] == row["text"] + tokenizer.decode(new, skip_special_tokens=True)
    assert found[-1]["text"] == ""


def test_a_prompt_that_is_too_long_is_continued_from_its_end(models):
    flags = ["--task", "text-generation", "--model", models / "decoder", "--max_new_tokens", 6]
    ends = ["a film was", "the story felt great", "not a good actor"]
    whole = answers(*("dull " * 100 + end for end in ends), *flags)
    # Of 64 places 6 are for new tokens and 2 for special ones.
    tails = answers(*("dull " * (56 - len(end.split())) + end for end in ends), *flags)
    new = [row["generated_text"][len(row["text"]) :] for row in whole]
    assert new == [row["generated_text"][len(row["text"]) :] for row in tails]
    assert len(set(new)) > 1


def test_sampling_repeats_with_the_seed_alone(models):
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
def test_summaries_and_translations_are_those_of_generate(models, task, model, prefix, key):
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
    ("apart", "own", "places", "asked", "wanted"),
    [
        (True, {"max_length": 142}, 1024, None, {}),  # BART for summaries knows its length
        (True, {}, 1024, None, {"max_new_tokens": 256}),
        (True, {}, 80, None, {"max_new_tokens": 79}),
        (True, {}, None, None, {"max_new_tokens": 256}),  # T5 has no table of positions
        (True, {"max_length": 142}, 1024, 9, {"max_new_tokens": 9}),
        (False, {}, 64, None, {"max_new_tokens": 32}),  # a decoder's text takes places as well
        (False, {"max_new_tokens": 20}, 64, None, {"max_new_tokens": 20}),
    ],
)
def test_new_text_is_as_long_as_asked_else_as_the_model_says_else_as_it_has_room(apart, own, places, asked, wanted):
    config = SimpleNamespace(is_encoder_decoder=apart, max_position_embeddings=places)
    model = SimpleNamespace(config=config, generation_config=GenerationConfig(**own))
    assert length_settings(model, asked) == wanted


class ManyLanguages:
    """What tokenizers of many languages have in common: mBART, NLLB, M2M100."""

    src_lang, unk_token_id = "en_XX", 3

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"en_XX": 11, "fr_XX": 12}.get(token, 3)


def test_languages_are_told_to_tokenizer_and_model():
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
        (["--model", "classifier", "--task", "question-answering", "--question", "a", "--context", "b"], "qa_outputs"),
        (["a", "--model", "minilm"], r"not a trained classifier.*classifier\.weight"),
        (["a", "--model", "bart", "--task", "fill-mask"], "row 1 has no <mask>"),
        (["a " * 90 + "<mask>", "--model", "masked", "--task", "fill-mask"], "beyond the 64 tokens"),
        (["a", "--model", "masked", "--task", "summarization"], "could not be loaded: Unrecognized configuration"),
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
        (["a", "--model", "absent"], "no such folder"),
        (["a", "--model", "classifier", "--max_length", 2], "no room for text beside 2 special tokens"),
    ],
)
def test_what_cannot_work_is_refused_in_the_users_words(models, flags, message):
    flags = [
        models / flag if i and flags[i - 1] == "--model" and flag != "minilm" else flag for i, flag in enumerate(flags)
    ]
    with pytest.raises(UserError, match=f"(?s){message}"):
        answers(*flags)


def test_a_classifier_without_entailment_chooses_no_labels(models):
    with pytest.raises(UserError, match=r"not trained on entailment \(its classes: bad, good, mixed\)"):
        answers("a", "--model", models / "classifier", "--task", "zero-shot-classification", "--candidate_labels", "x")


def test_a_tokenizer_without_a_mask_fills_none(tmp_path):
    folder = tiny_models.masked(tmp_path / "unmasked")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its tokenizer has no mask"):
        answers("a <mask>", "--task", "fill-mask", "--model", folder)


def test_a_run_without_a_model_is_refused(tmp_path):
    save_config(TrainConfig(), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="no model folder yet"):
        answers("a", "--model", tmp_path)


def test_a_file_of_lines_is_answered_line_by_line(models, tmp_path):
    found = answers("--input", lines_file(tmp_path / "t.txt", ["a film", "", "dull"]), "--model", models / "classifier")
    assert [(row["id"], row["text"]) for row in found] == [(0, "a film"), (1, ""), (2, "dull")]
