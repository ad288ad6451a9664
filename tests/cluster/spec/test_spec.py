"""The deployment spec: what it takes, and how precisely it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.cluster.cli import run
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.load import load
from arriero.router.gateway import GatewayConfig
from arriero.router.kv_events.zmq_publisher import KvEventsConfig
from arriero.router.tenants.keys import add_key
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.errors import SpecError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "arriero.yaml"
    path.write_text(text)
    return path


def test_flags_alone(model: Path) -> None:
    spec = load(None, {"model": str(model), "tp": 2, "pp": 3, "port": 0, "kv_memory": "1.5GiB"})
    one = spec.models[0]
    assert (one.name, one.path) == ("tiny", str(model))
    assert (one.mesh.tp, one.mesh.pp, one.kv.memory) == (2, 3, 3 * 2**29)
    assert spec.gateway.port == 0
    config = one.group_config("cpu")
    assert config.world_size == 6 and config.kv_bytes == 3 * 2**29


def test_a_url_stays_one(tmp_path: Path) -> None:
    spec = load(None, {"model": "s3://bucket/llama-8b"})
    assert (spec.models[0].name, spec.models[0].path) == ("llama-8b", "s3://bucket/llama-8b")
    assert spec.models[0].group_config("cpu").model_path == "s3://bucket/llama-8b"


def test_a_file_with_everything(tmp_path: Path, model: Path) -> None:
    spec = load(
        written(
            tmp_path,
            """
models:
  - name: small
    path: tiny
    dtype: float32
    groups: 2
    mesh: {tp: 2, pp: 2, tp_shares: [2, 1], layer_split: [10, 20]}
    kv: {blocks: 100, block_size: 32, prefix_cache: false}
    limits: {max_model_len: 512, max_sequences: 8, max_batch_tokens: 64, max_queued: 10}
    device: cpu
    kernels: cpu
    batch_independent: true
    threads: 1
    cpus_per_slice: 0.25
gateway: {host: 0.0.0.0, port: 6000, count: 2, drain_s: 3}
health: {period_s: 0.5, timeout_s: 2, start_timeout_s: 60, drain_s: 4}
ray: {address: "10.0.0.1:6379", object_store: 1GB}
""",
        ),
        {},
    )
    one = spec.models[0]
    assert one.path == str(model)
    config = one.group_config("cpu")
    assert config.tp_shares == (2, 1) and config.layer_split == (10, 20)
    assert (config.num_blocks, config.block_size, config.prefix_cache) == (100, 32, False)
    assert (config.kernels, config.batch_independent) == ("cpu", True)
    assert spec.num_slices == 8
    assert spec.ray.object_store == 10**9


def test_tiers_of_the_kv_cache(tmp_path: Path, model: Path) -> None:
    kv = "{host: 1GiB, disk: {path: /var/kv, size: 2GB}, shared: 's3://b/kv', tenant_share: 0.5}"
    spec = load(written(tmp_path, f"models: [{{name: a, path: tiny, kv: {kv}}}]\n"), {})
    tiers = spec.models[0].group_config("cpu").tiers
    assert tiers == TierConfig(
        host_bytes=1 << 30,
        disk_path="/var/kv",
        disk_bytes=2 * 10**9,
        shared_url="s3://b/kv",
        max_tenant_share=0.5,
    )


def test_windows(tmp_path: Path, model: Path) -> None:
    attention = "{sliding_window: 64, attention_sinks: 4, changes_answers: true}"
    path = written(tmp_path, f"models: [{{name: a, path: tiny, attention: {attention}}}]\n")
    config = load(path, {}).models[0].group_config("cpu")
    assert (config.sliding_window, config.attention_sinks, config.changes_answers) == (64, 4, True)
    flags = {"sliding_window": 128, "attention_sinks": 0, "changes_answers": False}
    config = load(path, flags).models[0].group_config("cpu")
    assert config.sliding_window == 128 and config.window_words == "window 128 sinks 0"
    path = written(tmp_path, "models: [{name: a, path: tiny, attention: {attention_sinks: 4}}]\n")
    with pytest.raises(SpecError, match=r"`attention_sinks`=4.*without `sliding_window`"):
        load(path, {})


def test_flags_lie_over_the_file(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path, "models: [{name: a, path: tiny, mesh: {tp: 2}}]\n")
    spec = load(path, {"pp": 2, "dtype": "float16", "address": "h:1", "start_timeout_s": 9})
    assert (spec.models[0].mesh.tp, spec.models[0].mesh.pp) == (2, 2)
    assert spec.models[0].dtype == "float16"
    assert (spec.ray.address, spec.health.start_timeout_s) == ("h:1", 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []\n", "arriero.yaml:1: `models`"),
        ("gateway: {}\n", "`models`: is needed"),
        ("models:\n- {name: a, path: tiny, tpp: 2}\n", "yaml:2: `models[0].tpp`: no such field"),
        ("models:\n- name: a\n  path: tiny\n  mesh:\n    tp: 0\n", "yaml:5: `models[0].mesh.tp`=0"),
        ("models: [{name: a b, path: tiny}]\n", "`models[0].name`='a b': use 1 to 128"),
        ("models: [{name: a, path: tiny, dtype: int3}]\n", "`models[0].dtype`='int3'"),
        (
            "models: [{name: a, path: tiny, mesh: {tp: 2, tp_shares: [1]}}]\n",
            "`tp_shares` has 1 entries for tp=2; give 2",
        ),
        ("models: [{name: a, path: tiny, kv: {memory: 5 frogs}}]\n", "200MB, 1.5GiB"),
        ("models: [{name: a, path: tiny, kv: {memory: 1GB, blocks: 3}}]\n", "keep one"),
        (
            "models: [{name: a, path: tiny, kv: {disk: {path: kv, size: 1GB}}}]\n",
            "`models[0].kv.disk.path`",
        ),
        (
            "models: [{name: a, path: tiny, groups: 2, prefill_groups: 2, kv: {host: 1GB}}]\n",
            "leaves none",
        ),
        (
            "models: [{name: a, path: tiny, groups: 2, prefill_groups: 1}]\n",
            "give `kv.host` a size",
        ),
        ("models: [{name: a, path: tiny}, {name: a, path: tiny}]\n", "`a` occurs twice"),
        ("models: [{name: a, path: nowhere}]\n", "nowhere has no config.json"),
        ("models: [{name: a, path: tiny}]\ngateway: {port: 70000}\n", "yaml:2: `gateway.port`"),
        (
            "models: [{name: a, path: tiny}]\nhealth: {period_s: .nan}\n",
            "yaml:2: `health.period_s`",
        ),
        ("models: [{name: a, path: tiny}]\nray: {object_store: 1MB}\n", "80MB or more"),
        ("- 1\n", "a spec is a mapping"),
        ("a: [\n", "not YAML"),
    ],
)
def test_refusals(tmp_path: Path, model: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(written(tmp_path, text), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml"):
        load(tmp_path / "nothing.yaml", {})


def test_model_flags_need_one_model(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path, "models: [{name: a, path: tiny}, {name: b, path: tiny}]\n")
    with pytest.raises(SpecError, match="--tp"):
        load(path, {"tp": 2})


def test_every_part_refuses_unknown_fields() -> None:
    parts = [
        DeploymentSpec,
        *(type(field.default) for field in DeploymentSpec.model_fields.values()),
    ]
    for part in parts:
        if hasattr(part, "model_config"):
            assert part.model_config["extra"] == "forbid"


def test_tenants_keys_and_certificates(tmp_path: Path, model: Path) -> None:
    add_key(tmp_path / "keys.yaml", "acme")
    text = """
models: [{name: small, path: tiny}]
gateway:
  count: 2
  keys: keys.yaml
  tenants: [{name: acme, weight: 2, tokens_per_minute: 1000, max_running: 3}]
  queue: {max_queued: 100, max_wait_s: 5}
"""
    spec = load(written(tmp_path, text), {})
    config = spec.gateway.config(("small",), None)
    assert config.keys == tmp_path / "keys.yaml"
    (tenant,) = config.tenants
    assert (tenant.weight, tenant.tokens_per_minute, config.limits.max_wait_s) == (2, 1000, 5)
    share = tenant.share(config.num_gateways)
    assert (share.tokens_per_minute, share.max_running) == (500, 2)


def test_pages_that_may_call(tmp_path: Path, model: Path) -> None:
    flags: list[tuple[str | None, tuple[str, ...]]] = [
        (None, ()),
        ("*", ("*",)),
        ("http://a:5173, https://b.example/", ("http://a:5173", "https://b.example")),
    ]
    for flag, origins in flags:
        spec = load(None, {"model": str(model)} | ({} if flag is None else {"cors": flag}))
        assert spec.gateway.config(("tiny",)).cors == origins
    text = "models: [{name: small, path: tiny}]\ngateway: {http: {cors: ['http://a:1', '*']}}\n"
    assert load(written(tmp_path, text), {}).gateway.config(("small",)).cors == ("http://a:1", "*")


def test_the_console_is_on_loopback_alone_by_default(tmp_path: Path, model: Path) -> None:
    def served(http: str) -> bool:
        text = f"models: [{{name: small, path: tiny}}]\ngateway: {{http: {http}}}\n"
        return load(written(tmp_path, text), {}).gateway.config(("small",)).console

    for host in ("127.0.0.1", "127.0.0.9", "localhost", "'::1'", "'[::1]'"):
        assert served(f"{{host: {host}}}"), host
        assert not served(f"{{host: {host}, console: false}}"), host
    for host in ("0.0.0.0", "'::'", "10.0.0.1", "loopback.example"):
        assert not served(f"{{host: {host}}}"), host
        assert served(f"{{host: {host}, console: true}}"), host
    assert not served("null")


def test_doors_for_other_routers(tmp_path: Path, model: Path) -> None:
    def config(gateway: str, models: str = "{name: small, path: tiny}") -> GatewayConfig:
        text = f"models: [{models}]\ngateway: {gateway}\n"
        return load(written(tmp_path, text), {}).gateway.config(("small",))

    assert (config("{}").vllm_engine, config("{}").kv_events) == (None, None)
    assert config("{vllm_engine: true}").vllm_engine == ""
    assert config("{vllm_engine: small}").vllm_engine == "small"
    sockets = config("{kv_events: {}}").kv_events
    assert sockets == KvEventsConfig(publish="tcp://127.0.0.1:5557")
    sockets = config("{kv_events: {publish: 'tcp://*:5557', replay: 'ipc:///run/r'}}").kv_events
    assert sockets == KvEventsConfig(publish="tcp://*:5557", replay="ipc:///run/r")
    two = "{name: small, path: tiny}, {name: other, path: tiny}"
    assert config("{vllm_engine: other}", two).vllm_engine == "other"
    with pytest.raises(SpecError, match="`vllm_engine: small`"):
        config("{vllm_engine: true}", two)


@pytest.mark.parametrize(
    ("gateway", "words"),
    [
        ("{tenants: [{name: a}]}", "`tenants` without `keys`"),
        ("{keys: none.yaml}", "`arriero keys add` makes the file"),
        ("{keys: k.yaml, tenants: [{name: a}, {name: a}]}", "tenant `a` occurs twice"),
        ("{tenants: [{name: anyone, weight: 0}]}", "greater than 0"),
        ("{tenants: [{name: anyone, burst: 3}]}", "no such field"),
        ("{tls: {certificate: c.pem, key: k.pem}}", "`gateway.tls`: .*c.pem"),
        ("{http: {cors: [localhost]}}", "no origin; write scheme, host and port"),
        ("{http: {cors: ['http://a/b']}}", "no origin"),
        ("{vllm_engine: other}", "`gateway.vllm_engine: other` is none of the models small"),
        ("{kv_events: {publish: 'udp://a:1'}}", "no address to listen on; write tcp://HOST:PORT"),
        ("{kv_events: {publish: 'tcp://127.0.0.1'}}", "no address to listen on"),
        (
            "{kv_events: {publish: 'tcp://*:5557', replay: 'tcp://*:5557'}}",
            "`publish` and `replay` are both",
        ),
    ],
)
def test_front_door_fields_are_refused_precisely(
    tmp_path: Path, model: Path, gateway: str, words: str
) -> None:
    path = written(tmp_path, f"models: [{{name: small, path: tiny}}]\ngateway: {gateway}\n")
    with pytest.raises(SpecError, match=words):
        load(path, {})


def test_keys_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(tmp_path / "keys.yaml")]
    assert run(["keys", "add", "acme", *file, "--note", "for tests"]) == 0
    key = capsys.readouterr().out.strip()
    assert run(["keys", "list", "--json", *file]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["tenant"], entry["note"]) == ("acme", "for tests")
    assert entry["id"] == key.split("-")[1]
    assert run(["keys", "revoke", "0" * 12, *file]) == 4
    assert run(["keys", "revoke", entry["id"], *file]) == 0
    assert run(["keys", "add", "a b", *file]) == 2
    capsys.readouterr()
    assert run(["keys", "list", "--json", *file]) == 0
    assert json.loads(capsys.readouterr().out) == []
