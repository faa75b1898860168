"""`fedveil statistics` and `fedveil merge`, end to end on tiny BERTs."""

import json
import shutil

import pytest
import torch
from cli_samples import make_rows, run_fedveil, write_bert, write_rows

from fedveil.errors import ProtocolError, WireError
from fedveil.merging import MergeStatistics

SHORT = ("--max-length", 16)


def write_model(folder, seed, dtype="float32", **changes):
    """A classifier that differs from the others by a little, head and all."""
    import transformers

    write_bert(folder, **changes)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.empty(parameter.shape).normal_(generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(pristine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "topics", 1, num_labels=3)
    write_model(folder / "ratings", 2, num_labels=2)
    write_model(folder / "other-topics", 3, num_labels=3)
    write_model(folder / "half", 4, "bfloat16", num_labels=3)
    for seed, name in enumerate(("topics", "ratings")):
        # No labels: statistics need none.
        write_rows(folder / f"{name}.jsonl", [{"text": r["text"]} for r in make_rows(30, seed)])
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """Models and data, and a working folder of this test alone."""
    home = tmp_path / "home"
    shutil.copytree(models, home)
    monkeypatch.chdir(home)
    return home


def load(folder):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")


def state(folder):
    return load(folder).state_dict()


def test_partners_make_statistics_and_someone_merges_by_them(here):
    """As three users would, in processes of their own."""
    for name in ("topics", "ratings"):
        done = run_fedveil(
            "statistics", name, "--data", f"{name}.jsonl", "--out", f"{name}.statistics", *SHORT,
            home=here,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"regmean statistics of 30 examples: {name}.statistics" in done.stdout
        assert "\x1b" not in done.stdout
        (here / f"{name}.jsonl").unlink()
    done = run_fedveil(
        "merge", "topics", "./ratings", "--out", "results/merged",
        "--statistics", "topics.statistics", "--statistics", "ratings.statistics", home=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "kept as each model's own: classifier.weight, classifier.bias" in done.stdout
    out = here / "results" / "merged"
    assert sorted(path.name for path in out.iterdir()) == ["merge.json", "ratings", "topics"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged"]
    states = {name: state(out / name) for name in ("topics", "ratings")}
    for name, own in states.items():
        before = state(here / name)
        assert torch.equal(own["classifier.weight"], before["classifier.weight"])
        assert not torch.equal(own["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])
        for key, tensor in own.items():
            if key.startswith("bert."):
                assert torch.equal(tensor, states["topics"][key])
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "ratings")
    inputs = tokenizer("goal match", return_tensors="pt")
    assert load(out / "ratings")(**inputs).logits.shape == (1, 2)
    record = json.loads((out / "merge.json").read_text())
    assert record["models"] == ["topics", "ratings"]
    assert record["weights"] == [30, 30]


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_merging_by_data_equals_merging_by_statistics_of_them(here, call, method):
    names = ("topics", "ratings")
    for name in names:
        code, _, err = call(
            "statistics", name, "--data", f"{name}.jsonl", "--out", name + ".s",
            "--method", method, "--examples", 12, *SHORT,
        )  # fmt: skip
        assert code == 0, err
        assert MergeStatistics.load(name + ".s").examples == 12
    files = [part for name in names for part in ("--statistics", name + ".s")]
    data = [part for name in names for part in ("--data", name + ".jsonl")]
    for out, given in (("a", files), ("b", [*data, *SHORT, "--examples", 12])):
        code, _, err = call("merge", *names, *given, "--method", method, "--out", out)
        assert code == 0, err
    for name in names:
        one, other = (here / out / name / "model.safetensors" for out in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_the_mean_of_alike_models_is_one_model(here, call):
    code, out, err = call("merge", "topics", "other-topics", "--method", "mean", "--out", "m")
    assert code == 0, err
    assert "kept" not in out
    assert "merged model: m" in out
    one, other, mean = (state(here / name) for name in ("topics", "other-topics", "m"))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)


def test_weights_and_patterns(here, call):
    code, _, err = call(
        "merge", "topics", "other-topics", "--method", "mean", "--out", "m",
        "--weight", 1, "--weight", 3, "--keep", "classifier.*",
    )  # fmt: skip
    assert code == 0, err
    one, other = (state(here / name) for name in ("topics", "other-topics"))
    first, second = (state(here / "m" / name) for name in ("topics", "other-topics"))
    assert torch.equal(second["classifier.weight"], other["classifier.weight"])
    name = "bert.pooler.dense.weight"
    torch.testing.assert_close(first[name], (one[name] + 3 * other[name]) / 4)


def test_half_precision_stays_half_precision(here, call):
    code, _, err = call("merge", "half", "topics", "--method", "mean", "--out", "m")
    assert code == 0, err
    assert {tensor.dtype for tensor in state(here / "m").values()} == {torch.bfloat16}
    half, wide, mean = (state(name) for name in ("half", "topics", "m"))
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((half[name].float() + wide[name]) / 2).bfloat16())


def test_models_of_the_same_name_are_numbered(here, call):
    for run in ("a", "b"):
        shutil.copytree(here / ("topics" if run == "a" else "ratings"), here / run / "model")
    code, _, err = call("merge", "a/model", "b/model", "--method", "mean", "--out", "m")
    assert code == 0, err
    assert sorted(path.name for path in (here / "m").iterdir()) == [
        "merge.json", "model-1", "model-2",
    ]  # fmt: skip


def test_classes_of_other_names_are_pointed_out(here, call):
    path = here / "other-topics" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": "rain", "1": "sun", "2": "snow"}
    path.write_text(json.dumps(config))
    code, _, err = call("merge", "topics", "other-topics", "--method", "mean", "--out", "m")
    assert code == 0, err
    assert err.startswith("warning: the models' classes differ")
    assert "rain" in err
    assert "--keep classifier.*" in err
    code, _, err = call(
        "merge", "topics", "other-topics", "--method", "mean", "--keep", "classifier.*",
        "--out", "m2",
    )  # fmt: skip
    assert (code, err) == (0, "")


def test_nothing_is_replaced_unasked(here, call):
    mean = ("merge", "topics", "other-topics", "--method", "mean", "--out")
    assert call(*mean, "m")[0] == 0
    before = (here / "m" / "model.safetensors").read_bytes()
    code, _, err = call(*mean, "m")
    assert code == 2
    assert "--overwrite" in err
    code, _, err = call(*mean, "m", "--weight", 1, "--weight", 2, "--overwrite")
    assert code == 0, err
    assert (here / "m" / "model.safetensors").read_bytes() != before
    (here / "letters").mkdir()
    (here / "letters" / "dear.txt").write_text("dear")
    for place in ("letters", "topics", ".", "..", "topics.jsonl"):
        code, _, err = call(*mean, place, "--overwrite")
        assert code == 2, place
        assert err.startswith("error: ")
    assert (here / "letters" / "dear.txt").read_text() == "dear"
    assert not [path for path in here.iterdir() if "unfinished" in path.name]


def test_a_failure_while_saving_leaves_the_earlier_result(here, call, monkeypatch):
    import transformers

    mean = ("merge", "topics", "other-topics", "--method", "mean", "--out", "m")
    assert call(*mean)[0] == 0
    before = (here / "m" / "model.safetensors").read_bytes()

    def full(*args, **words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.BertTokenizerFast, "save_pretrained", full)
    code, _, err = call(*mean, "--weight", 1, "--weight", 2, "--overwrite")
    assert code == 1
    assert "No space left" in err
    assert (here / "m" / "model.safetensors").read_bytes() == before
    assert not [path for path in here.iterdir() if "unfinished" in path.name]


def test_a_file_of_statistics_is_not_replaced_unasked(here, call):
    arguments = ("statistics", "topics", "--data", "topics.jsonl", "--out", "s", *SHORT)
    assert call(*arguments)[0] == 0
    code, _, err = call(*arguments)
    assert code == 2
    assert "--overwrite" in err
    assert call(*arguments, "--overwrite")[0] == 0


DATA = ("--data", "topics.jsonl", "--data", "ratings.jsonl", "--max-length", 16)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("topics", *DATA), 2, ["nothing to merge", "2 models"]),
        (("topics", "absent", *DATA), 1, ["cannot be loaded", "absent"]),
        (("topics", "./absent", *DATA), 2, ["no such folder", "absent"]),
        (("topics", "ratings"), 2, ["its own statistics", "2 times --statistics or --data"]),
        (("topics", "ratings", "--data", "topics.jsonl"), 2, ["found 1"]),
        (("topics", "ratings", *DATA, "--statistics", "s"), 2, ["contradict"]),
        (("topics", "ratings", "--method", "mean", *DATA), 2, ["takes no statistics"]),
        (("topics", "ratings", "--method", "median", *DATA), 2, ["regmean or mean or fisher"]),
        (("topics", "ratings", *DATA, "--off-diagonal", 2), 2, ["off_diagonal", "0 to 1"]),
        (("topics", "ratings", *DATA, "--keep", "head.*"), 2, ["matches no tensor", "head.*"]),
        (("topics", "ratings", *DATA, "--weight", 1), 2, ["weights", "2 numbers"]),
        (("topics", "ratings", *DATA, "--text", "body"), 3, ["'body'", "'text'"]),
        (("topics", "ratings", *DATA[:4]), 2, ["--max-length of at most 32", "found 128"]),
        (("topics", "encoder", *DATA), 2, ["no text classifier", "BertModel", "encoder"]),
        (("topics", "module:make", *DATA), 2, ["folder or hub name", "module:make"]),
        (("topics", "wide", *DATA), 2, ["too little in common"]),
        (("topics", "broken", *DATA), 2, ["NaN", "model 2"]),
        (("topics", "foreign", *DATA), 2, ["different vocabularies", "foreign"]),
        (("topics", "ratings", "--statistics", "s", "--statistics", "s"), 2, ["no such file", "s"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error(here, call, arguments, code, words, pristine):
    if "encoder" in arguments:
        shutil.copytree(pristine / "bert", here / "encoder")
    if "wide" in arguments:
        write_bert(here / "wide", num_labels=3, hidden_size=32)
    if "broken" in arguments:
        write_model(here / "broken", 1, num_labels=3, layer_norm_eps=1e-5)
        model = load(here / "broken")
        with torch.no_grad():
            model.classifier.bias[0] = float("nan")
        model.save_pretrained(here / "broken")
    if "foreign" in arguments:
        import transformers

        shutil.copytree(here / "topics", here / "foreign")
        words_ = (here / "foreign" / "vocab.txt").read_text().splitlines()
        (here / "foreign" / "vocab.txt").write_text("\n".join(words_[:5] + words_[:4:-1]))
        tokenizer = transformers.BertTokenizerFast(str(here / "foreign" / "vocab.txt"))
        tokenizer.save_pretrained(here / "foreign")
    found, _, err = call("merge", *arguments, "--out", "m")
    assert found == code, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), err
    assert not (here / "m").exists()


def test_files_of_statistics_that_do_not_fit(here, call):
    for name in ("topics", "ratings"):
        call("statistics", name, "--data", f"{name}.jsonl", "--out", f"{name}.s", *SHORT)
    merge = ("merge", "topics", "ratings", "--out", "m", "--statistics")
    code, _, err = call(*merge, "ratings.s", "--statistics", "topics.s")
    assert code == ProtocolError.exit_code
    assert "taken with another model (in statistics 1)" in err
    assert "order of the models" in err
    code, _, err = call(*merge, "topics.s", "--statistics", "topics/model.safetensors")
    assert code == WireError.exit_code
    assert "topics/model.safetensors" in err
    assert "fedveil statistics" in err
    data = (here / "ratings.s").read_bytes()
    (here / "ratings.s").write_bytes(data[:-10])
    code, _, err = call(*merge, "topics.s", "--statistics", "ratings.s")
    assert code == WireError.exit_code
    assert "ratings.s" in err
    code, _, err = call(*merge, "topics.s", "--statistics", "topics.s", "--method", "fisher")
    assert code == ProtocolError.exit_code
    assert "another method" in err
    assert not (here / "m").exists()


def test_layers_are_excluded_on_request(here, call):
    arguments = ("statistics", "topics", "--data", "topics.jsonl", "--out", "s", *SHORT)
    code, _, err = call(*arguments, "--exclude", "*.attention.*")
    assert code == 0, err
    names = MergeStatistics.load("s").message.sections
    assert any("intermediate" in name for name in names)
    assert not any("attention" in name for name in names)
    for extra in (("--exclude", "nothing.*"), ("--exclude", "*", "--method", "fisher")):
        code, _, err = call(*arguments, "--overwrite", *extra)
        assert code == 2
        assert "exclude" in err


def test_method_without_statistics(here, call):
    code, _, err = call(
        "statistics", "topics", "--data", "topics.jsonl", "--out", "s", "--method", "mean", *SHORT
    )
    assert code == 2
    assert "regmean or fisher" in err


@pytest.mark.parametrize("command", ["merge", "statistics"])
def test_help_has_examples(command, call):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"fedveil {command} ./" in out
    assert "--debug" in out


def edited(path, **changes):
    """A JSON file of a model folder, changed."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MEAN = ("merge", "topics", "other-topics", "--method", "mean", "--out", "m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4}, ["architectures that differ", "_heads is 2 and 4"]),
        ({"hidden_act": "relu"}, ["hidden_act is 'gelu' and 'relu'", "topics and other-topics"]),
        ({"layer_norm_eps": 1e-5}, ["layer_norm_eps is 1e-12 and 1e-05"]),
        ({"id2label": {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}}, ["another order", "--keep"]),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_compute_something_else_are_refused(here, call, changes, words):
    edited(here / "other-topics" / "config.json", **changes)
    code, _, err = call(*MEAN)
    assert code == 2
    assert err.startswith("error: ")
    assert all(word in err for word in words), err
    assert not (here / "m").exists()


def test_what_no_output_depends_on_is_a_warning(here, call):
    edited(here / "other-topics" / "config.json", hidden_dropout_prob=0.4, dtype="bfloat16")
    edited(here / "other-topics" / "tokenizer_config.json", model_max_length=20)
    code, _, err = call(*MEAN)
    assert code == 0, err
    for words in ("hidden_dropout_prob (0.1 and 0.4)", "model_max_length", "float32, bfloat16"):
        assert words in err


@pytest.mark.parametrize("part", ["normalizer", "post_processor", "cls_token"])
def test_tokenizers_that_make_other_tokens_of_a_text_are_refused(here, call, part):
    if part == "cls_token":
        edited(here / "other-topics" / "tokenizer_config.json", cls_token="[SEP]")
    else:
        whole = json.loads((here / "other-topics" / "tokenizer.json").read_text())
        whole[part] = None
        (here / "other-topics" / "tokenizer.json").write_text(json.dumps(whole))
        edited(here / "other-topics" / "tokenizer_config.json",
               tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
        edited(here / "topics" / "tokenizer_config.json",
               tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    code, _, err = call(*MEAN)
    assert code == 2, err
    assert "other tokens of the same text" in err
    assert part in err
    code, _, err = call(*MEAN, "--keep", "bert.embeddings.word_embeddings.*")
    assert code == 0, err


def test_an_adapter_is_no_model_to_merge(here, call):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    code, _, err = call("merge", "topics", "adapter", "--method", "mean", "--out", "m")
    assert code == 2
    assert "merge_and_unload" in err
