"""The order of classes: the model's own is taken, and what contradicts it is refused."""

import json
import shutil
from typing import Any

import datasets
import pytest
import torch
import transformers

import toys
from fedveil import ConfigurationError, Federation, TextClassification, Training
from fedveil.config import build, load_config
from fedveil.config.folders import check_folders
from fedveil.errors import FedveilWarning
from fedveil.hub import encode_labels
from fedveil.hub.models import load_model
from fedveil.hub.settings import ModelTable
from fedveil.tasks.classes import in_stated_order, same_classes, stated_classes
from fedveil.training import evaluate

TOPICS = {"sports": ("goal", "match"), "politics": ("vote", "law"), "business": ("bank", "stock")}
ORDER = [*TOPICS]  # not sorted
FILE = """
[model]
name = "own"
{model}
[data]
train = "rows.json"
test = "rows.json"
max_length = 8
{data}
[partition]
clients = 2
[training]
steps = 1
batch_size = 4
[scheme]
name = "fedavg"
[federation]
rounds = 1
"""


def rows_of(names=None, count=24):
    names = names or ORDER
    return [
        {"text": f"{TOPICS[topic][n % 2]} the {TOPICS[topic][0]}", "label": names[place]}
        for n in range(count // 3)
        for place, topic in enumerate(TOPICS)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that tells the topics apart, in an order of its own."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", *sum(TOPICS.values(), ())]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    (folder / "vocab.txt").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=256, max_position_embeddings=16, num_labels=3,
                initializer_range=0.2,
                id2label=dict(enumerate(ORDER)), label2id={n: i for i, n in enumerate(ORDER)},
            )
        )  # fmt: skip
        task = TextClassification(tokenizer, max_length=8)
        batch = task.collate(task.prepare(rows_of([0, 1, 2])).select(range(24)))
        model.eval()
        step = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(60):
            step.zero_grad()
            task.loss(model, batch).backward()
            step.step()
    assert evaluate(model, task, rows_of([0, 1, 2]))["accuracy"] == 100
    model.save_pretrained(folder / "own")
    tokenizer.save_pretrained(folder / "own")
    return folder


@pytest.fixture
def home(trained, tmp_path):
    folder = tmp_path / "home"
    shutil.copytree(trained, folder)
    (folder / "rows.json").write_text(json.dumps(rows_of()))
    return folder


def federation_of(home, data="", model="", rows=None, settings=None):
    if rows is not None:
        (home / "rows.json").write_text(json.dumps(rows))
    if settings is not None:
        path = home / "own" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    (home / "f.toml").write_text(FILE.format(data=data, model=model))
    return build(load_config(home / "f.toml"))


def base_of(federation):
    return evaluate(federation.model, federation._task, federation._test)["accuracy"]


def named(federation):
    return [*federation.model.config.id2label.values()]


def test_the_models_own_order_is_taken_and_kept(home):
    federation = federation_of(home)
    assert base_of(federation) == 100
    assert named(federation) == ORDER


def test_the_data_may_know_fewer_classes_and_say_so(home):
    with pytest.warns(FedveilWarning, match="no rows: 'sports'"):
        federation = federation_of(home, rows=[r for r in rows_of() if r["label"] != "sports"])
    assert base_of(federation) == 100
    assert named(federation) == ORDER


@pytest.mark.parametrize("respell", [str.upper, lambda name: f" {name} ", str.capitalize])
def test_case_and_space_make_no_other_class(home, respell):
    with pytest.warns(FedveilWarning, match="taken to mean the same"):
        federation = federation_of(home, rows=rows_of([respell(name) for name in ORDER]))
    assert base_of(federation) == 100
    assert named(federation) == ORDER


@pytest.mark.parametrize("numbers", [[0, 1, 2], ["0", "1", "2"]])
def test_whole_numbers_are_those_of_the_models_outputs(home, numbers):
    federation = federation_of(home, rows=rows_of(numbers))
    assert base_of(federation) == 100
    assert named(federation) == ORDER


def test_numbers_keep_their_meaning_where_one_does_not_occur(home):
    federation = federation_of(home, rows=[r for r in rows_of([0, 1, 2]) if r["label"] != 0])
    assert base_of(federation) == 100


def test_numbers_from_one_are_refused(home):
    with pytest.raises(ConfigurationError, match=r"no output for.*'3'"):
        federation_of(home, rows=rows_of([1, 2, 3]))


def test_a_class_that_the_model_has_not_is_refused(home):
    rows = [*rows_of(), {"text": "the bank", "label": "weather"}]
    with pytest.raises(ConfigurationError, match=r"no output for.*'sports'.*'weather'.*new_head"):
        federation_of(home, rows=rows)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (sorted(ORDER), "in another order"),
        (["good", "bad", "ugly"], "not those that the model was trained for"),
        ([*ORDER, "weather"], "not those that the model was trained for"),
        (["politics", "business"], "not those that the model was trained for"),
        (["2", "1", "0"], "not those that the model was trained for"),
    ],
)
def test_labels_that_contradict_the_model_are_refused_and_both_are_named(home, labels, said):
    with pytest.raises(ConfigurationError, match=said) as caught:
        federation_of(home, f"labels = {json.dumps(labels)}")
    assert "'sports', 'politics', 'business'" in caught.value.expected
    assert all(repr(label) in caught.value.found for label in labels)


@pytest.mark.parametrize("labels", [ORDER, [name.upper() for name in ORDER]])
def test_labels_in_the_models_order_are_taken(home, labels):
    federation = federation_of(home, f"labels = {json.dumps(labels)}", rows=rows_of(labels))
    assert base_of(federation) == 100
    assert named(federation) == ORDER


def test_a_model_without_names_has_the_order_of_the_data(home):
    federation = federation_of(
        home, settings={"id2label": {str(n): f"LABEL_{n}" for n in range(3)}, "label2id": None}
    )
    assert named(federation) == sorted(ORDER)


def test_names_by_number_count_where_those_by_name_are_made_up(home):
    made_up = {str(n): f"LABEL_{n}" for n in range(3)}
    assert base_of(federation_of(home, settings={"id2label": made_up})) == 100


def test_a_model_that_contradicts_itself_is_refused(home):
    turned = {name: 2 - number for number, name in enumerate(ORDER)}
    with pytest.raises(ConfigurationError, match="contradicts itself"):
        federation_of(home, settings={"label2id": turned})


def test_with_a_new_head_the_order_is_that_of_the_data_and_nothing_is_left_of_the_old(home):
    old = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    federation = federation_of(home, model="new_head = true")
    assert named(federation) == sorted(ORDER)
    assert not torch.equal(federation.model.classifier.weight, old.classifier.weight)
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(federation.model.state_dict()[pooler], old.state_dict()[pooler])


@pytest.mark.parametrize("names", [[0, 1, 2], ["0", "1", "2"], ORDER, ["red", "green", "blue"]])
@pytest.mark.parametrize("says", ["names", "nothing"])
def test_a_new_head_is_new_whatever_the_labels_are(home, names, says):
    old = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    unnamed = {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}, "label2id": None}
    settings = unnamed if says == "nothing" else None
    model = federation_of(home, "", "new_head = true", rows_of(names), settings).model
    assert not torch.isclose(model.classifier.weight, old.classifier.weight).any()
    assert not torch.isclose(model.classifier.bias, old.classifier.bias).any()
    again = federation_of(home, "", "new_head = true").model
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_new_head_is_new_in_a_list_of_numbers_too(home):
    old = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    model = federation_of(home, 'labels = ["0", "1", "2"]', "new_head = true", rows_of([0, 1, 2]))
    assert not torch.equal(model.model.classifier.weight, old.classifier.weight)


def test_of_a_head_that_clients_hold_nothing_is_drawn_unless_the_file_says_so(home):
    """What the owner releases keeps a head for as many classes, and so does what clients hold."""
    old = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    for table in (ModelTable(name="own"), ModelTable(name="own", new_head=True)):
        held: Any = load_model(
            table,
            "text-classification",
            ["red", "green", "blue"],
            home,
            seed=0,
            approved=object(),  # type: ignore[arg-type]
        )
        kept = torch.equal(held.classifier.weight, old.classifier.weight)
        assert kept is not table.new_head
    with pytest.raises(ConfigurationError, match="in another order"):
        load_model(
            ModelTable(name="own"), "text-classification", sorted(ORDER), home, seed=0,
            approved=object(),  # type: ignore[arg-type]
        )  # fmt: skip


def test_names_of_a_model_without_a_head_mean_nothing(home):
    whole = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    whole.bert.save_pretrained(home / "own")
    assert "id2label" in json.loads((home / "own" / "config.json").read_text())
    assert named(federation_of(home)) == sorted(ORDER)


def publish(home, names, seed=5):
    """A public model for these classes, in this order."""
    settings = transformers.AutoConfig.from_pretrained(home / "own").to_dict()
    settings |= {
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.BertConfig(**settings)
        transformers.BertForSequenceClassification(config).save_pretrained(home / "public")
    for path in (home / "own").glob("*token*"):
        shutil.copy(path, home / "public")


LENT = ('owner = "rows.json"', 'public = "public"')


@pytest.mark.parametrize("names", [sorted(ORDER), [name.upper() for name in sorted(ORDER)]])
@pytest.mark.parametrize("numbers", [None, [0, 1, 2]])
def test_a_public_model_is_held_against_the_owners_whatever_the_data_say(home, names, numbers):
    publish(home, names)
    with pytest.raises(ConfigurationError, match=r"class 0 to be 'sports'.*public model 'public'"):
        federation_of(home, *LENT, rows=rows_of(numbers))


@pytest.mark.parametrize("own", ["unnamed", "new"])
def test_labels_decide_where_the_owners_model_has_no_order_as_the_error_says(home, own):
    publish(home, ORDER)
    model = LENT[1] + ("\nnew_head = true" if own == "new" else "")
    settings = {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}, "label2id": None}
    with pytest.raises(ConfigurationError, match="the data say") as caught:
        federation_of(home, LENT[0], model, settings=settings if own == "unnamed" else None)
    line = caught.value.fix.partition("write ")[2].partition(" in [data]")[0]
    assert line == f"labels = {json.dumps(ORDER)}"
    assert named(federation_of(home, f"{LENT[0]}\n{line}", model)) == ORDER


def test_a_public_model_without_a_head_is_taken_as_the_error_says(home):
    publish(home, sorted(ORDER))
    whole = transformers.BertForSequenceClassification.from_pretrained(home / "public")
    whole.bert.save_pretrained(home / "public")
    federation = federation_of(home, *LENT)
    assert federation.configuration()["fresh"] == ["*classifier.*"]


def test_a_public_model_for_other_classes_keeps_its_head(home):
    publish(home, ["red", "green", "blue"])
    public = transformers.BertForSequenceClassification.from_pretrained(home / "public")
    federation = federation_of(home, *LENT)
    assert torch.equal(federation.released.classifier.weight, public.classifier.weight)


def test_a_public_model_that_a_function_makes_is_held_against_the_owners_too(home, monkeypatch):
    publish(home, sorted(ORDER))
    monkeypatch.syspath_prepend(str(home))
    (home / "made_in_public.py").write_text(
        "from pathlib import Path\nimport transformers\n"
        "def model():\n"
        "    return transformers.BertForSequenceClassification.from_pretrained(\n"
        "        Path(__file__).parent / 'public')\n"
    )
    model = 'public = "made_in_public:model"\ntokenizer = "own"'
    with pytest.raises(ConfigurationError, match="public model 'made_in_public:model' says"):
        federation_of(home, LENT[0], model)


def test_a_dry_run_says_that_the_public_model_has_another_order(home):
    publish(home, sorted(ORDER))
    (home / "f.toml").write_text(FILE.format(data=LENT[0], model=LENT[1]))
    with pytest.raises(ConfigurationError, match="public model 'public' says"):
        check_folders(load_config(home / "f.toml"))


def test_a_public_model_for_the_same_classes_in_another_order_is_refused(home):
    publish(home, sorted(ORDER))
    with pytest.raises(ConfigurationError, match="in another order") as caught:
        federation_of(home, 'owner = "rows.json"', 'public = "public"')
    assert caught.value.expected == (
        "class 0 to be 'sports', as the id2label of your model 'own' says"
    )
    assert caught.value.found == (
        "class 0 to be 'business', as the id2label of the public model 'public' says"
    )
    assert "`labels` in [data] change neither" in caught.value.fix


def test_a_function_with_a_model_of_another_order_is_refused(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home))
    (home / "made_for_classes.py").write_text(
        "from pathlib import Path\nimport transformers\n"
        "def model():\n"
        "    return transformers.BertForSequenceClassification.from_pretrained(\n"
        "        Path(__file__).parent / 'own')\n"
    )
    (home / "f.toml").write_text(
        FILE.format(data="", model='tokenizer = "own"').replace(
            '"own"', '"made_for_classes:model"', 1
        )
    )
    with pytest.raises(ConfigurationError, match="in another order"):
        build(load_config(home / "f.toml"))
    text = (home / "f.toml").read_text()
    (home / "f.toml").write_text(text.replace("[data]", f"[data]\nlabels = {json.dumps(ORDER)}"))
    assert base_of(build(load_config(home / "f.toml"))) == 100


def test_loading_by_itself_refuses_another_order(home):
    table = ModelTable(name="own")
    assert load_model(table, "text-classification", ORDER, home, seed=0).num_labels == 3
    with pytest.raises(ConfigurationError, match="in another order"):
        load_model(table, "text-classification", sorted(ORDER), home, seed=0)


class TestInPython:
    def make(self, home, names):
        rows = datasets.Dataset.from_list(rows_of())
        rows, _ = encode_labels(rows, names=names)
        model = transformers.BertForSequenceClassification.from_pretrained(home / "own")
        task = TextClassification(transformers.AutoTokenizer.from_pretrained(home / "own"))
        return Federation(model, [rows], task=task, test=rows, training=Training(steps=1))

    def test_rows_that_are_numbered_otherwise_are_refused(self, home):
        with pytest.raises(ConfigurationError, match=r"in another order.*client-00"):
            self.make(home, None)

    def test_rows_in_the_models_order_are_right(self, home):
        assert base_of(self.make(home, ORDER)) == 100

    def test_rows_must_be_numbered_alike(self, home):
        model = transformers.BertForSequenceClassification.from_pretrained(home / "own")
        model.config.id2label = {n: f"LABEL_{n}" for n in range(3)}
        model.config.label2id = {f"LABEL_{n}": n for n in range(3)}
        task = TextClassification(transformers.AutoTokenizer.from_pretrained(home / "own"))
        one, other = (
            encode_labels(datasets.Dataset.from_list(rows_of()), names=names)[0]
            for names in (ORDER, sorted(ORDER))
        )
        with pytest.raises(ConfigurationError, match="number their classes alike"):
            Federation(model, [one, other], task=task)


class TestChance:
    def test_a_base_no_better_than_guessing_is_said_and_written_down(self, home):
        heard = []

        class Ear:
            def __getattr__(self, name):
                return lambda *values: heard.append(values[0]) if name == "base_doubted" else None

        turned = {"id2label": {str(n): name for n, name in enumerate(ORDER[1:] + ORDER[:1])}}
        federation = federation_of(home, settings={**turned, "label2id": None})
        federation._observer = Ear()
        result = federation.run()
        assert result.base["accuracy"] == 0
        assert heard == [result.doubt]
        assert "right in 33.3 %" in result.doubt
        assert "order of classes" in result.doubt

    @pytest.mark.parametrize("count", [3, 30, 33, 99])
    def test_always_the_same_answer_is_chance(self, count):
        from fedveil.tasks import ImageClassification
        from fedveil.tasks.guessing import no_better_than_chance

        task = ImageClassification()
        data = task.prepare(toys.rows(count))
        reached = {"accuracy": 100 * (count // 3) / count}
        told = no_better_than_chance(reached, task, data, None)  # type: ignore[arg-type]
        assert told is not None
        assert "right in 33.3 %" in told
        better = {"accuracy": 100 * (count // 3 + 1) / count}
        assert no_better_than_chance(better, task, data, None) is None  # type: ignore[arg-type]

    def test_of_a_better_one_nothing_is_said(self, home):
        assert federation_of(home).run().doubt is None

    def test_a_language_model_is_compared_with_equally_likely_tokens(self):
        from fedveil.tasks.guessing import no_better_than_chance

        task = type("Words", (), {"metric": "loss"})()
        assert no_better_than_chance({"loss": 5.7}, task, None, toys.gpt2()).startswith("The base")  # type: ignore[arg-type]
        assert no_better_than_chance({"loss": 5.5}, task, None, toys.gpt2()) is None  # type: ignore[arg-type]


def test_names_that_are_numbers_are_names_unless_both_can_be_meant():
    stars = ["1", "2", "3"]
    assert in_stated_order(stars, ["1", "2", "3"]) == stars
    assert in_stated_order(stars, ["0", "1", "2"]) == ["0", "1", "2"]
    with pytest.raises(ConfigurationError, match="names of classes, or numbers"):
        in_stated_order(stars, ["1", "2"])


def test_classes_that_differ_in_case_alone_are_not_guessed_at():
    with pytest.raises(ConfigurationError, match="cannot be told"):
        in_stated_order(["a", "b"], ["B", "b", "a"])
    with pytest.raises(ConfigurationError, match="cannot be told"):
        in_stated_order(["us", "US"], ["Us"])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"id2label": {"1": "b", "0": "a"}}, ["a", "b"]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "LABEL_0", "1": "yes"}}, ["LABEL_0", "yes"]),
        ({"id2label": {"1": "LABEL_1", "2": "LABEL_2"}}, None),
        ({"id2label": None}, None),
        ({}, None),
    ],
)
def test_what_a_configuration_says(settings, names):
    assert stated_classes(settings) == names


@pytest.mark.parametrize(
    "settings",
    [
        {"id2label": {"0": "a", "2": "b"}},
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": {"x": "a"}},
        {"id2label": {"0": "LABEL_0", "5": "yes"}},
        {"label2id": {"a": 1, "b": 2}},
    ],
)
def test_names_that_are_not_numbered_as_outputs_are_refused(settings):
    with pytest.raises(ConfigurationError, match=r"does not number them.*config\.json"):
        stated_classes(settings)


@pytest.mark.parametrize("begins", ["run", "dry run"])
def test_so_they_are_in_a_file(home, begins):
    turned = {"id2label": {str(n + 1): name for n, name in enumerate(ORDER)}, "label2id": None}
    with pytest.raises(ConfigurationError, match="does not number them"):
        federation_of(home, settings=turned)
    if begins == "dry run":
        with pytest.raises(ConfigurationError, match="does not number them"):
            check_folders(load_config(home / "f.toml"))


def test_a_key_that_stands_twice_in_a_configuration_is_refused(home):
    """Whoever reads it keeps the last: the order would be another."""
    path = home / "own" / "config.json"
    names = ", ".join(f'"{n}": "{name}"' for n, name in enumerate([*ORDER, ORDER[0]]))
    twice = names.replace('"3":', '"1":')
    settings = {k: v for k, v in json.loads(path.read_text()).items() if "label" not in k}
    text = json.dumps(settings)[:-1] + ', "id2label": {' + twice + "}}"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"stands twice.*'1'.*Delete"):
        federation_of(home)


def test_a_new_heads_names_are_those_of_the_data(home):
    """Numbers mean something else than the old head's names."""
    numbers = federation_of(home, "", "new_head = true", rows_of([0, 1, 2]))
    assert named(numbers) == ["0", "1", "2"]


def test_one_name_for_two_classes_is_refused():
    with pytest.raises(ConfigurationError, match="one name for two"):
        stated_classes({"id2label": {"0": "a", "1": "a"}})


def test_a_beginning_of_the_order_is_no_contradiction():
    assert same_classes(["a", "b", "c"], ["A", " b"])
    assert same_classes(["a", "b", "c"], ["0", "1"])
    assert not same_classes(["a", "b", "c"], ["b", "a"])
    assert not same_classes(["a"], ["a", "b"])
