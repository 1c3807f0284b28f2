"""Ray's LLM application (vLLM): what an endpoint becomes there, and what is refused; a machine without vLLM goes that far."""

from __future__ import annotations

import importlib.util

import pytest

from serving.endpoint import Adapter, EngineSettings, Table, Version, write_table
from serving.targets.local import serving
from training.errors import InputError
from training.model import EMBEDDED
from training.recipe import Recipe

ray_serve = pytest.importorskip("serving.targets.ray_serve")


def table(**fields) -> Table:
    engine = EngineSettings(kind="vllm", gpus=2, replicas=1, most_replicas=3, adapters_loaded=5)
    return Table(**({"name": "tiny", "engine": engine} | fields))


def version(number: int, share: float = 0.0) -> Version:
    return Version(version=number, folder=f"models/tiny/{number}", digest="0", share=share)


def adapter(name: str, folder: str | None, **recipe) -> Adapter:
    return Adapter(name=name, folder=folder, recipe=Recipe(**recipe).model_dump(mode="json"))


def test_every_version_and_the_base_of_the_adapters_become_a_model():
    whole = table(
        versions=(version(1), version(2, 1)),
        adapters=(adapter("base", None), adapter("fast", "s3://b/a/fast", rank=4), adapter("small", "s3://b/a/small", rank=32)),
    )
    first, second, base = ray_serve.llm_configs(whole)
    assert first["model_loading_config"] == {"model_id": "tiny@v1", "model_source": "models/tiny/1"}
    assert second["model_loading_config"]["model_id"] == "tiny"
    assert first["deployment_config"]["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3}
    assert first["engine_kwargs"]["tensor_parallel_size"] == 2 and first["engine_kwargs"]["trust_remote_code"] is False
    assert "enable_lora" not in first["engine_kwargs"]
    assert base["model_loading_config"] == {"model_id": "tiny@base", "model_source": str(EMBEDDED)}
    assert base["lora_config"] == {"dynamic_lora_loading_path": "s3://b/a", "max_num_adapters_per_replica": 5}
    assert (base["engine_kwargs"]["max_lora_rank"], base["engine_kwargs"]["max_loras"]) == (32, 5)


def test_ray_accepts_the_settings():
    llm_config = pytest.importorskip("ray.llm._internal.serve.core.configs.llm_config", exc_type=ImportError)
    whole = table(versions=(version(1, 1),), adapters=(adapter("fast", "s3://b/a/fast"),))
    for config in ray_serve.llm_configs(whole):
        assert llm_config.LLMConfig(**config).model_id in ("tiny", "tiny@base")
    with pytest.raises(ValueError, match="dynamic_lora_loading_path"):
        llm_config.LLMConfig(**(config | {"lora_config": {"dynamic_lora_loading_path": "adapters"}}))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"versions": (version(1, 0.5), version(2, 0.5))}, "does not divide requests"),
        ({"adapters": (adapter("fast", "adapters/fast"),)}, "must lie side by side in S3"),
        ({"adapters": (adapter("a", "s3://b/a/a"), adapter("b", "s3://b/b/b"))}, "must lie side by side"),
        ({"adapters": (adapter("a", "s3://b/a/a", bits=4),)}, "trained on a quantized base"),
        ({"adapters": (adapter("a", "s3://b/a/a"), adapter("b", "s3://b/a/b", model="other"))}, "several bases"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(fields, said):
    with pytest.raises(InputError, match=said):
        ray_serve.llm_configs(table(**fields))


def test_that_it_asks_for_no_token_must_be_known():
    with pytest.raises(InputError, match="asks for no token"):
        ray_serve.build_llm(table(versions=(version(1, 1),)))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_it_says_what_to_install():
    with pytest.raises(InputError, match=r'vllm is not to be had here .* Install "ray\[llm\]"'):
        ray_serve.build_llm(table(versions=(version(1, 1),)), without_token=True)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_an_endpoint_for_vllm_is_deployed_with_it_or_not_at_all(tmp_path):
    write_table(tmp_path, table(versions=(version(1, 1),)))
    with pytest.raises(InputError, match="vllm is not to be had here"):  # and no cluster is started for it
        ray_serve.deploy(tmp_path)
    with pytest.raises(InputError, match="vllm models are not served by this process"), serving(tmp_path):
        pass
