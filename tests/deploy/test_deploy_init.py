"""The folders of a deployment: what each side gets, and what it does not."""

import importlib.metadata
import os
import re
import stat
import subprocess

import datasets
import pytest
import transformers
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from deploy_samples import FILE

import fedveil
import toys
from fedveil.aggregation import RegMean
from fedveil.config import build, build_workplace, load_config
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.checking import Survey
from fedveil.errors import ConfigurationError
from fedveil.schemes import FedAvg, FedQSN


def write(folder, host="fl.example.org", public_port=443):
    config = load_config(folder / "federation.toml")
    return write_deployment(config, Address(host, 9092, public_port), folder / "deployment")


def test_there_is_a_folder_for_each_side(folder):
    made = write(folder)
    assert [path.name for path in made] == ["owner", "clinic-1", "clinic-2"]
    for path in made:
        assert (path / "README.md").is_file()
        for script in path.glob("*.sh"):
            assert script.stat().st_mode & stat.S_IXUSR
            subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize(
    ("host", "superlink", "ports"),
    [
        ("fl.example.org", 9092, [9094, 9094]),
        ("127.0.0.1", 9092, [9094, 9095]),
        ("localhost", 9094, [9095, 9096]),
    ],
)
def test_supernodes_of_one_machine_have_ports_of_their_own(folder, host, superlink, ports):
    config = load_config(folder / "federation.toml")
    _, *partners = write_deployment(config, Address(host, superlink), folder / "deployment")
    for partner, port in zip(partners, ports, strict=True):
        assert f"${{FEDVEIL_PORT:-{port}}}" in (partner / "supernode.sh").read_text()
        assert f"port {port}," in (partner / "README.md").read_text()
        assert "supernode.sh" in Survey.of(load_config(partner / "partner.toml")).programs


def test_keys_are_pairs_and_private_ones_are_their_owners(folder):
    owner, *partners = write(folder)
    publics = set()
    for partner in partners:
        key = partner / "node.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        private = load_ssh_private_key(key.read_bytes(), None)
        public = load_ssh_public_key((owner / "keys" / f"{partner.name}.pub").read_bytes())
        assert private.public_key() == public
        publics.add(public.public_numbers())
    assert len(publics) == 2
    assert stat.S_IMODE((owner / "tls" / "server.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("host", ["fl.example.org", "127.0.0.1", "10.1.2.3", "::1"])
def test_the_certificate_is_for_the_host_and_signed_by_what_clients_trust(folder, host):
    owner, partner, _ = write(folder, host)
    leaf = x509.load_pem_x509_certificate((owner / "tls" / "server.pem").read_bytes())
    root = x509.load_pem_x509_certificate((partner / "ca.crt").read_bytes())
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert host in [str(name.value) for name in names]
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_clients_get_nothing_of_the_servers(folder):
    _, partner, _ = write(folder)
    shown = "".join(
        path.read_text() for path in partner.rglob("*") if path.suffix in {".toml", ".sh", ".md"}
    )
    shown = shown.replace("--superexec-auth-secret-file", "")  # between two programs of the client
    for word in (
        "client_mask",
        "server_mask",
        "policy",
        "secret",
        "seed",
        "test.parquet",
    ):
        assert word not in shown
    secret = (folder / "federation.secret").read_text().strip()
    assert all(secret.encode() not in data for data in toys.files(partner).values())


def test_the_app_that_reaches_clients_has_no_code(folder):
    owner, *_ = write(folder)
    assert [path.name for path in (owner / "app").rglob("*")] == ["pyproject.toml"]
    text = (owner / "app" / "pyproject.toml").read_text()
    assert "[tool.flwr.app.config]" not in text
    assert "fedveil.flower.apps:server" in text


def test_a_clients_file_makes_what_the_owners_makes(folder):
    _, partner, _ = write(folder)
    toml = partner / "partner.toml"
    rows = [{"image": r["image"].tolist(), "label": r["label"]} for r in toys.rows(9)]
    datasets.Dataset.from_list(rows).to_parquet(partner / "data.parquet")
    toml.write_text(toml.read_text().replace("data.csv", "data.parquet"))
    Survey.of(load_config(toml)).approve()
    place, owner = build_workplace(load_config(toml)), load_config(folder / "federation.toml")
    assert list(place.trainers) == ["clinic-1"]
    assert place.trainers["clinic-1"].examples == 9
    assert place.trainers["clinic-1"].training == owner.training
    assert repr(place.side) == repr(owner.scheme.client())
    shapes = {name: tensor.shape for name, tensor in place.architecture.state_dict().items()}
    model = build(owner).model
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_of_a_hub_model_clients_get_the_architecture_alone(folder):
    model = toys.bert()
    model.save_pretrained(folder / "bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    rows = [{"text": "1 2 3", "label": n % 3} for n in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    text = FILE.format(model="bert", task="text-classification")
    (folder / "federation.toml").write_text(text.replace("labels =", "max_length = 8\nlabels ="))
    _, partner, _ = write(folder)
    names = {path.name for path in (partner / "architecture").iterdir()}
    assert "config.json" in names
    assert not any(name.endswith((".safetensors", ".bin", ".pt")) for name in names)
    datasets.Dataset.from_list(rows).to_parquet(partner / "data.parquet")
    toml = partner / "partner.toml"
    toml.write_text(toml.read_text().replace("data.csv", "data.parquet"))
    place = build_workplace(load_config(toml))
    own = toys.weights(model)
    assert {n: t.shape for n, t in place.architecture.state_dict().items()} == {
        n: t.shape for n, t in own.items()
    }


def test_keys_are_never_written_over(folder):
    write(folder)
    before = toys.files(folder / "deployment")
    with pytest.raises(ConfigurationError, match="not empty"):
        write(folder)
    assert toys.files(folder / "deployment") == before


def test_a_file_without_partners(folder):
    text = (folder / "federation.toml").read_text().split("[partners]")[0]
    data = text.replace('test = "test', 'train = "test.parquet"\ntest = "test')
    (folder / "federation.toml").write_text(data + "[partition]\nclients = 2\n")
    with pytest.raises(ConfigurationError, match=r"\[partners\]"):
        write(folder)


def test_keys_elsewhere_than_the_file_says(folder):
    config = load_config(folder / "federation.toml")
    with pytest.raises(ConfigurationError, match="keys would not be where"):
        write_deployment(config, Address("h"), folder / "elsewhere")
    assert not (folder / "elsewhere").exists()


def test_nginx_lets_clients_through_to_the_fleet_alone(folder):
    owner, *_ = write(folder)
    text = (owner / "nginx.conf").read_text()
    assert text.count("location") == 2
    assert "location /v1/fleet/ {" in text
    assert "return 403" in text
    assert "{{" not in text


@pytest.mark.parametrize(
    "scheme",
    [FedAvg(update_bits=4, error_feedback=True),
     FedQSN(aggregation=RegMean(), units="columns", update_bits=8, shrink=False)],
)  # fmt: skip
def test_clients_need_no_field_but_those_named(scheme):
    words = {name: getattr(scheme, name) for name in scheme.client_fields}
    assert repr(type(scheme)(**words).client()) == repr(scheme.client())


def test_clients_who_hold_the_backbone_are_told_its_name(folder):
    model = toys.gpt2()
    model.save_pretrained(folder / "gpt2")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "gpt2")
    rows = [{"prompt": "1 2", "completion": "3"}] * 3
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    text = FILE.format(model="gpt2", task="causal-lm").replace('labels = ["0", "1", "2"]', "")
    text = text.replace('units = "neurons"\nclient_mask = 0.25', 'name = "fedlpp"')
    lora = '[model.lora]\nr = 2\ntarget_modules = ["c_attn"]\nfan_in_fan_out = true\n'
    (folder / "federation.toml").write_text(text.replace("[data]", lora + "[data]\nmax_length = 8"))
    _, partner, _ = write(folder)
    assert not (partner / "architecture").exists()
    datasets.Dataset.from_list(rows).to_parquet(partner / "data.parquet")
    model.save_pretrained(partner / "gpt2")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(partner / "gpt2")
    toml = partner / "partner.toml"
    toml.write_text(toml.read_text().replace("data.csv", "data.parquet"))
    place = build_workplace(load_config(toml))
    state = toys.weights(place.architecture)
    assert any(tensor.any() for name, tensor in state.items() if "lora_" not in name)
    assert not any(tensor.any() for name, tensor in state.items() if "lora_" in name)


def test_where_a_public_model_is_released_clients_are_told_of_that_alone(folder):
    net = (folder / "net.py").read_text()
    (folder / "in_house.py").write_text(net.replace("manual_seed(0)", "manual_seed(1)"))
    file = folder / "federation.toml"
    text = file.read_text().replace(
        'name = "net:build"', 'name = "in_house:build"\npublic = "net:build"'
    )
    file.write_text(text.replace("[data]", '[data]\nowner = "test.parquet"'))
    _, partner, _ = write(folder)
    names = {path.name for path in partner.rglob("*")}
    assert "net.py" in names
    assert "in_house.py" not in names
    told = "".join(path.read_text() for path in partner.rglob("*") if path.suffix != ".key")
    assert "in_house" not in told
    assert 'name = "net:build"' in (partner / "partner.toml").read_text()
    assert "owner" not in (partner / "partner.toml").read_text().split("[model]")[1]


def test_where_a_random_initialization_is_released_clients_get_the_architecture(folder):
    toys.bert().save_pretrained(folder / "in-house")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "in-house")
    rows = [{"text": "1 2", "label": number} for number in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    text = FILE.format(model="in-house", task="text-classification")
    text = text.replace("[data]", '[data]\nmax_length = 8\nowner = "test.parquet"')
    both = 'name = "in-house"\ntokenizer = "in-house"\npublic = "random"'
    text = text.replace('name = "in-house"', both)
    text = text.replace("[data]", '[data]\ntuned = "test.parquet"')
    (folder / "federation.toml").write_text(text + "\n[tuning]\nsteps = 3\n")
    _, partner, _ = write(folder)
    assert not list(partner.rglob("*.safetensors"))
    told = (partner / "partner.toml").read_text()
    assert all(word not in told for word in ("in-house", "random", "tun"))
    datasets.Dataset.from_list(rows).to_parquet(partner / "data.parquet")
    (partner / "partner.toml").write_text(told.replace("data.csv", "data.parquet"))
    place = build_workplace(load_config(partner / "partner.toml"))
    assert not any(tensor.any() for tensor in toys.weights(place.architecture).values())


class TestContainers:
    """They cannot be built here: what can be known of them without is that all parts agree."""

    def test_the_owners_publish_nothing_but_what_nginx_guards(self, folder):
        owner, *_ = write(folder, public_port=8443)
        services = yaml.safe_load((owner / "compose.yaml").read_text())["services"]
        superlink, nginx = services["superlink"], services["nginx"]
        assert superlink["ports"] == ["8443:8443"]
        assert "ports" not in nginx
        assert nginx["network_mode"] == "service:superlink"
        assert "listen 8443 ssl" in (owner / "nginx.conf").read_text()
        assert "proxy_pass https://127.0.0.1:9092" in (owner / "nginx.conf").read_text()
        assert "--port 9092" in (owner / "superlink.sh").read_text()

    def test_everything_that_is_named_is_there(self, folder):
        for one in write(folder):
            compose = yaml.safe_load((one / "compose.yaml").read_text())
            services, volumes = compose["services"], compose.get("volumes", {})
            for service in services.values():
                for mount in service["volumes"]:
                    source = mount.split(":")[0]
                    assert (one / source).exists() or source in volumes
                if service.get("build"):
                    (command,) = service["command"]
                    assert os.access(one / command, os.X_OK)
                    assert service["user"].startswith("${RUN_AS")
                    assert service["cap_drop"] == ["ALL"]

    def test_the_owners_files_keep_their_paths(self, folder):
        owner, *_ = write(folder)
        superlink = yaml.safe_load((owner / "compose.yaml").read_text())["services"]["superlink"]
        assert superlink["working_dir"] == str(owner)
        assert superlink["volumes"] == [f"{folder}:{folder}"]
        assert str(folder / "federation.toml") in (owner / "superlink.sh").read_text()

    def test_images_have_this_version_and_extras_that_there_are(self, folder):
        extras = set(importlib.metadata.metadata("fedveil").get_all("Provides-Extra") or ())
        for one in write(folder):
            lines = (one / "Dockerfile").read_text().splitlines()
            (wanted,) = re.findall(r'ARG FEDVEIL="fedveil\[(.*)\]==(.*)"', "\n".join(lines))
            assert set(wanted[0].split(",")) <= extras
            assert wanted[1] == fedveil.__version__
            known = {"FROM", "ARG", "RUN", "ENV"}
            assert {line.split()[0] for line in lines if not line.startswith("#")} <= known

    def test_what_a_client_approved_is_kept_beside_its_folder_and_not_in_it(self, folder):
        """A container's own disk is new every time, and its folder is the owner's work."""
        _, partner, _ = write(folder)
        service = yaml.safe_load((partner / "compose.yaml").read_text())["services"]["supernode"]
        mounts = dict(mount.split(":") for mount in service["volumes"])
        (home,) = re.findall(r"XDG_CONFIG_HOME=(\S+)", (partner / "Dockerfile").read_text())
        assert mounts["approvals"] == home
        assert not home.startswith(mounts["."])

    def test_on_one_machine_there_are_none(self, folder):
        for one in write(folder, "127.0.0.1"):
            assert not (one / "compose.yaml").exists()
