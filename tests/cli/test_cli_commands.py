import time

import pytest
import torch
from cli_samples import run_fedveil, write_bert

import fedveil
from fedveil.cli.app import _show_warning, complain, say
from fedveil.errors import WireError
from fedveil.quantization import kernels_in_use
from fedveil.screen import PlainConsole
from fedveil.wire import Dense, Message, Section, UnitIndex

COMMANDS = ("run", "demo", "units", "inspect")


def test_help_lists_the_commands_and_is_fast(tmp_path):
    started = time.perf_counter()
    done = run_fedveil("--help", home=tmp_path)
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert "\x1b" not in done.stdout
    assert seconds < 30  # on a machine that is busy; about 2 s on one that is not


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command, call):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"fedveil {command}" in out
    assert "--debug" in out


def test_version(call):
    status, out, err = call("--version")
    assert (status, err) == (0, "")
    assert out.startswith(f"fedveil {fedveil.__version__}\nPython 3.")
    assert out.endswith(f"torch {torch.__version__}, {kernels_in_use()} kernels\n")


def test_unknown_command(call):
    code, _, err = call("rnu")
    assert code == 2
    assert "run" in err


def test_missing_file_is_one_line_without_traceback(tmp_path):
    done = run_fedveil("run", "nowhere.toml", home=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: There is no such file (in ")
    assert done.stderr.count("\n") == 1


def test_debug_shows_where_an_error_came_from(tmp_path, call):
    for arguments in (
        ("--debug", "run", tmp_path / "none.toml"),
        ("run", tmp_path / "none.toml", "--debug"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert "Traceback" in err
        assert "error: There is no such file" in err


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ('name = "bert"', 'name = "./absent"', 2, ["no such folder", "absent"]),
        ('name = "bert"', 'name = "absent:build"', 2, ["cannot be imported", "absent"]),
        ('train = "train.jsonl"', 'train = "trian.jsonl"', 3, ["trian.jsonl", "train.jsonl"]),
        ("max_length = 16", "max_length = 64", 2, ["[data] max_length", "at most 32"]),
        ("max_length = 16", 'text = "txt"\nmax_length = 16', 3, ["'txt'", "'text'"]),
        ("max_length = 16", 'label = "topic"\nmax_length = 16', 3, ["the training set", "topic"]),
        ('name = "bert"', 'name = "bert"\nnum_labels = 2', 2, ["at least 3", "num_labels"]),
        ("clients = 2", "clients = 40", 3, ["too few rows"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error(home, call, old, new, code, words):
    config = home / "federation.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    found, _, err = call("run", config)
    assert found == code
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_unreachable_hub_is_one_clear_error(home):
    config = home / "federation.toml"
    config.write_text(config.read_text().replace('name = "bert"', 'name = "owner/absent"'))
    done = run_fedveil("run", config, home=home)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The model cannot be loaded (in owner/absent)")
    assert done.stderr.count("\n") == 1
    assert "hub" in done.stderr
    assert "network" in done.stderr


def test_class_of_the_test_set_that_no_client_has(home, call):
    with (home / "test.jsonl").open("a") as file:
        file.write('{"text": "rain", "label": "weather"}\n')
    code, _, err = call("run", home / "federation.toml")
    assert code == 3
    assert "the test set" in err
    assert "'weather'" in err


def test_head_for_other_classes_is_replaced_only_if_asked(home, call):
    write_bert(home / "two", num_labels=2)
    config = home / "federation.toml"
    text = config.read_text().replace('name = "bert"', 'name = "two"')
    config.write_text(text)
    code, _, err = call("run", config, "--rounds", 1)
    assert code == 2
    assert "new_head" in err
    config.write_text(text.replace('name = "two"', 'name = "two"\nnew_head = true'))
    code, _, err = call("run", config, "--rounds", 1)
    assert code == 0, err


def test_units_of_a_folder_and_of_a_configuration(home, call):
    code, out, err = call("units", home / "bert")
    assert code == 0, err
    assert "encoder.layer.0.mlp" in out
    assert "256" in out
    assert "heads" not in out
    code, out, _ = call("units", home / "federation.toml", "--choice", "neurons")
    assert code == 0
    assert "heads" in out
    assert "can be withheld" in out
    assert "nothing of a withheld unit is left" in out
    assert "Weights that no unit has a part of" in out
    assert "pooler.dense.weight" in out
    code, _, err = call("units", home / "bert", "--choice", "rows")
    assert code == 2
    assert "columns or neurons or mlp" in err


def test_units_of_a_model_without_a_rule_are_asked_for_only_by_masks(home, call):
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    transformers.FNetModel(transformers.FNetConfig(**sizes)).save_pretrained(home / "fnet")
    config = home / "federation.toml"
    words = config.read_text().replace('name = "bert"', 'name = "fnet"')
    config.write_text(words)
    code, _, err = call("units", config)
    assert code == 2
    assert "no rule is needed" in err
    before = words.partition("[scheme]")[0]
    after = words.partition("[scheme]")[2].partition("[")
    rest = after[1] + after[2]
    config.write_text(f'{before}[scheme]\nname = "fedavg"\n{rest}')
    code, out, err = call("units", config)
    assert code == 0, err
    assert "none are needed" in out


def test_units_of_a_file_that_withholds_none_says_so(home, call):
    config = home / "federation.toml"
    before, _, after = config.read_text().partition("[scheme]")
    rest = "".join(after.partition("[")[1:])
    config.write_text(f'{before}[scheme]\nname = "fedavg"\n{rest}')
    code, out, err = call("units", config)
    assert code == 0, err
    assert "withholds none of these: clients are sent all of the model" in " ".join(out.split())
    assert "Tried on the model" not in out


def test_inspect_says_what_a_message_holds(tmp_path, call):
    import torch

    sections: dict[str, Section] = {
        "layer.weight": Dense(torch.zeros(2, 3)),
        "units/layer": UnitIndex(4, torch.tensor([0, 2])),
    }
    data = Message("proxy", "fedqsn", 7, "clinic-2", sections, {"steps": 5}).to_bytes()
    path = tmp_path / "kept.safetensors"
    path.write_bytes(data)
    code, out, err = call("inspect", path)
    assert code == 0, err
    for words in (
        "proxy of scheme fedqsn, round 7, client clinic-2", f"{len(data):,} bytes",
        "layer.weight", "float32", "2 x 3", "24", "2 of 4 units released (50.0 %)", "steps = 5",
    ):  # fmt: skip
        assert words in out


def test_inspect_refuses_what_is_no_message(tmp_path, call):
    path = tmp_path / "junk"
    path.write_bytes(b"junk")
    code, _, err = call("inspect", path)
    assert code == WireError.exit_code
    assert err.startswith("error: ")
    assert call("inspect", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\u202eb", "[red]x[/red]"])
def test_what_is_said_is_neither_markup_nor_steers(text, capsys):
    say(PlainConsole(), f"for {text}\n")
    complain("warning", f"one {text}\ntwo")
    _show_warning(set(), UserWarning(text), UserWarning, "file.py", 1)
    said = capsys.readouterr()
    shown = text.encode("unicode_escape").decode()
    assert said.out == f"for {shown}\\n\n"
    assert f"one {shown}\ntwo\n" in said.err
    assert f"UserWarning: {shown}" in said.err
