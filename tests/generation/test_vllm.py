"""vLLM's documented interface, recorded: what is not in it is an error. vLLM itself does not run in these tests."""

import json
import sys
import threading
import types
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lightning_rlhf.functional import truncated_importance_weights
from lightning_rlhf.generation import Generator, Sampling, VLLMGenerator, VLLMServerGenerator
from lightning_rlhf.models import LanguageModel
from tests.models.families import tiny
from tests.tokenizers import letters

PROMPTS = [[5, 6, 7], [10]]
# Of vllm.EngineArgs, which LLM takes as keywords beside its own.
ENGINE_ARGUMENTS = {
    "dtype": str,
    "quantization": (str, type(None)),
    "gpu_memory_utilization": float,
    "max_model_len": (int, type(None)),
    "tensor_parallel_size": int,
    "enforce_eager": bool,
    "trust_remote_code": bool,
    "enable_lora": bool,
    "max_loras": int,
    "max_lora_rank": int,
    "logprobs_mode": str,
    "generation_config": str,
}


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list | None = None
    stop_token_ids: list | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self):
        assert -(2**63) <= self.seed < 2**63
        assert all(isinstance(each, str) for each in self.stop)
        assert all(isinstance(each, int) for each in self.stop_token_ids)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self):
        assert self.lora_int_id > 0


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple
    cumulative_logprob: float | None
    logprobs: list | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list
    outputs: list = field(default_factory=list)
    finished: bool = True


class LLM:
    made: list = []

    def __init__(self, model, *, tokenizer=None, **engine_arguments):
        assert isinstance(model, str)
        assert model
        for name, value in engine_arguments.items():
            assert isinstance(value, ENGINE_ARGUMENTS[name]), name
        self.model, self.arguments, self.calls = model, engine_arguments, []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert all(set(prompt) == {"prompt_token_ids"} for prompt in prompts)
        assert all(type(params) is SamplingParams for params in sampling_params)
        assert len(prompts) == len(sampling_params)
        weights = lora_request and load_file(Path(lora_request.lora_path) / "adapter_model.safetensors")
        self.calls.append((prompts, sampling_params, lora_request, weights))
        return [
            RequestOutput(
                prompt["prompt_token_ids"], [self.output(k, params) for k in reversed(range(params.n))]
            )
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    @staticmethod
    def output(index, params):
        """The first sample ends with the end token, the others are cut off."""
        tokens = (20 + index, 2) if index == 0 else (20 + index, 30)
        at = [{tokens[0]: Logprob(-0.5), 77: Logprob(-0.1)}, {tokens[1]: Logprob(-1.5 - index)}]
        return CompletionOutput(index, f"text {index}", tokens, -2.0, at, "stop" if index == 0 else "length")


@pytest.fixture
def vllm(monkeypatch):
    module, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr(LLM, "made", [])
    return module


@pytest.fixture
def policy():
    base = tiny("LlamaConfig")
    base.config._name_or_path = base.name_or_path = "some/base"
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    model.add_adapter("reference", LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    return LanguageModel(model, layout="padded")


def sample(generator, policy, **settings):
    sampling = Sampling(**{"num_samples": 2, "max_new_tokens": 2, **settings})
    return list(generator.generate(policy, letters(), PROMPTS, sampling, seeds=[3, 2**62 - 1]))


def adapter(policy, name="default"):
    return {n: p for n, p in policy.model.named_parameters() if f".{name}." in n}


def same_weights(saved, parameters):
    assert len(saved) == len(parameters) > 0
    return all(
        torch.equal(saved[name.replace(".default.", ".").replace(".reference.", ".")], parameter)
        for name, parameter in parameters.items()
    )


def test_completions_with_the_logprobs_that_they_were_sampled_with(vllm, policy):
    groups = sample(VLLMGenerator(), policy)
    assert [[c.tokens for c in group] for group in groups] == [[[20, 2], [21, 30]]] * 2
    assert [[c.prompt for c in group] for group in groups] == [[prompt] * 2 for prompt in PROMPTS]
    first, second = groups[0]
    assert (first.text, first.truncated, first.logprobs) == ("text 0", False, [-0.5, -1.5])
    assert (second.text, second.truncated, second.logprobs) == ("text 1", True, [-0.5, -2.5])
    weights = truncated_importance_weights(torch.tensor([-0.5, -0.5]), torch.tensor(second.logprobs), cap=2.0)
    assert weights.tolist() == [1.0, 2.0]


def test_what_is_asked_for(vllm, policy):
    generator = VLLMGenerator(gpu_memory_utilization=0.2, max_model_len=64)
    sample(generator, policy, temperature=0.7, top_p=0.9, top_k=5, min_new_tokens=1, stop=("x",))
    (engine,) = LLM.made
    assert engine.model == "some/base"
    assert engine.arguments["logprobs_mode"] == "processed_logprobs"
    assert engine.arguments["generation_config"] == "vllm"
    ((prompts, params, request, _),) = engine.calls
    assert [prompt["prompt_token_ids"] for prompt in prompts] == PROMPTS
    assert [one.seed for one in params] == [3, 2**62 - 1]
    expected = SamplingParams(2, 0.7, 0.9, 5, 3, ["x"], [2], 2, 1, 0)
    assert params[0] == expected
    assert not Path(request.lora_path).exists()  # nothing is left on disk


def test_the_adapter_is_the_policys_as_it_is_now(vllm, policy):
    generator = VLLMGenerator("other/base")
    sample(generator, policy)
    with torch.no_grad():
        for parameter in adapter(policy).values():
            parameter.add_(1.0)
    sample(generator, policy)
    with policy.role("reference"):
        sample(generator, policy)
    with policy.role(None):
        sample(generator, policy)
    (engine,) = LLM.made
    assert engine.model == "other/base"
    first, second, reference, base = engine.calls
    assert not same_weights(first[3], adapter(policy))
    assert same_weights(second[3], adapter(policy))
    assert same_weights(reference[3], adapter(policy, "reference"))
    assert base[2] is None
    assert len({call[2].lora_int_id for call in (first, second, reference)}) == 3


def test_full_fine_tuning_is_refused(vllm):
    model = LanguageModel(tiny("LlamaConfig"), layout="padded")
    with pytest.raises(ValueError, match="the engine is given LoRA adapters, and this policy has none"):
        sample(VLLMGenerator("some/base"), model)


def test_without_vllm_the_error_says_how_to_get_it(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rlhf\[vllm\]'"):
        sample(VLLMGenerator(), policy)


def test_it_is_configurable_and_made_without_vllm():
    parser = ArgumentParser()
    parser.add_argument("--generator", type=Generator)
    chosen = ["--generator", "lightning_rlhf.generation.VLLMGenerator", "--generator.max_model_len", "512"]
    generator = parser.instantiate(parser.parse_args(chosen)).generator
    assert generator.settings["max_model_len"] == 512
    assert "vllm" not in sys.modules


# --- the server -------------------------------------------------------------------------------------------------------

COMPLETION_REQUEST = {each.name for each in fields(SamplingParams)} | {"model", "prompt", "return_token_ids"}


class Server(BaseHTTPRequestHandler):
    """The endpoints that are used, strict about what they are sent."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = getattr(self, self.path.replace("/v1/", "on_"), self.missing)(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass

    def missing(self, body):
        return 404, json.dumps({"error": "Not Found"})

    def on_load_lora_adapter(self, body):
        assert set(body) == {"lora_name", "lora_path"}
        self.server.loaded[body["lora_name"]] = load_file(
            Path(body["lora_path"]) / "adapter_model.safetensors"
        )
        self.server.seen.append(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def on_unload_lora_adapter(self, body):
        self.server.last = self.server.loaded.pop(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def on_completions(self, body):
        if not set(body) <= COMPLETION_REQUEST or body["model"] not in {*self.server.loaded, "base"}:
            return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
        choices = []
        for index in reversed(range(body["n"])):
            logprobs = {
                "token_logprobs": [-0.5, -1.0],
                "tokens": ["a", "b"],
                "top_logprobs": [],
                "text_offset": [],
            }
            finish = "stop" if body["prompt"] == [10] else "length"
            tokens = [body["prompt"][0], 20 + index]
            choices.append(
                {
                    "index": index,
                    "text": "ab",
                    "token_ids": tokens,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }
            )
        return 200, json.dumps({"object": "text_completion", "choices": choices})


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.loaded, made.seen = {}, []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_server_is_given_the_adapter_and_samples(server, policy, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/"
    generator = VLLMServerGenerator(url, "base", shared_dir=str(tmp_path))
    groups = sample(generator, policy)
    assert [[c.tokens for c in group] for group in groups] == [[[5, 20], [5, 21]], [[10, 20], [10, 21]]]
    assert [c.truncated for group in groups for c in group] == [True, True, False, False]
    assert groups[0][0].logprobs == [-0.5, -1.0]
    assert same_weights(server.last, adapter(policy))
    sample(generator, policy)
    assert server.seen == ["policy-1", "policy-2"]
    assert server.loaded == {}
    assert list(tmp_path.iterdir()) == []
    with policy.role(None):
        assert sample(generator, policy) == groups
    assert len(server.seen) == 2


def test_a_server_that_refuses_or_is_not_there(server, policy):
    url = f"http://127.0.0.1:{server.server_port}"
    with (
        policy.role(None),
        pytest.raises(ConnectionError, match="answered 404 to .*/v1/completions: .*`wrong`"),
    ):
        sample(VLLMServerGenerator(url, "wrong"), policy)
    with pytest.raises(ConnectionError, match="no vLLM server at http://127.0.0.1:9"):
        sample(VLLMServerGenerator("http://127.0.0.1:9", "base"), policy)
