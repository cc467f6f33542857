"""A real server on this machine that fails, delays, lies and dies."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_rlhf.rewards import EndpointReward, RewardError, WeightedReward, score
from lightning_rlhf.rewards.endpoint import EndpointError, delays
from tests.rewards.conftest import Fixed, samples_of


class Server(ThreadingHTTPServer):
    """Answers as ``script`` says, one entry a request; then with each completion's last digit."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """Broken connections are the point."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((body, dict(self.headers), time.monotonic()))
            action = self.server.script.pop(0) if self.server.script else None
        if action == "die":
            self.connection.close()
        elif action == "break":
            self.answer(200, b'{"scores": [1', length=1000)
        elif action == "delay":
            time.sleep(1.0)
        elif isinstance(action, int):
            self.answer(action, b"not now")
        elif action is not None:
            self.answer(200, action)
        else:
            scores = [int(text[-1]) for text in body["completions"]]
            self.answer(200, json.dumps({"scores": scores}).encode())

    def answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), Handler)
    server.requests, server.script, server.lock = [], [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def reward(server, **settings):
    return EndpointReward(server.url, **{"backoff": 0.01, "max_attempts": 3, "timeout": 0.3, **settings})


def test_batches_columns_and_token(server, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    samples = samples_of(5, answer=list("abcde"), secret=[object()] * 5)
    ours = reward(server, batch_size=2, columns=["answer"], token_env="REWARD_TOKEN")
    assert score(ours, samples).parts["endpoint"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    bodies = sorted((body for body, _, _ in server.requests), key=lambda body: body["prompts"])
    assert [len(body["prompts"]) for body in bodies] == [2, 2, 1]
    assert bodies[2] == {
        "prompts": ["prompt 4"],
        "completions": ["answer 4"],
        "columns": {"answer": ["e"]},
    }
    assert all(headers["Authorization"] == "Bearer secret" for _, headers, _ in server.requests)


@pytest.mark.parametrize("failure", ["die", "break", "delay", 503, 429, b"{cut"])
def test_a_failure_is_tried_again(server, failure):
    server.script = [failure, failure]
    assert score(reward(server), samples_of(3)).total.tolist() == [0.0, 1.0, 2.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "said"),
    [("delay", "timed out"), (503, "HTTP 503 Service Unavailable: not now"), ("die", "RemoteDisconnected")],
)
def test_the_error_after_the_last_attempt(server, failure, said):
    server.script = [failure] * 9
    with pytest.raises(RewardError) as caught:
        score(reward(server), samples_of(3))
    message = str(caught.value)
    assert server.url in message
    assert "failed 3 times in " in message
    assert said in message
    assert isinstance(caught.value.__cause__, EndpointError)
    assert len(server.requests) == 3


def test_a_server_that_dies_midway(server):
    """What was answered is not asked again; the rest is an error that names the address."""
    ours = reward(server, batch_size=1, num_connections=1)
    server.script = [None, None, *["die"] * 3]
    with pytest.raises(RewardError, match=rf"{server.url} failed 3 times"):
        score(ours, samples_of(9))
    asked = [body["completions"][0] for body, _, _ in server.requests]
    assert asked[:5] == ["answer 0", "answer 1", *["answer 2"] * 3]
    assert len(asked) == 5
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match="ConnectionRefusedError|Connection refused"):
        score(ours, samples_of(2))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"scores": [1, 2]}', "answered 2 scores for 3 completions"),
        (b'{"rewards": [1, 2, 3]}', 'answered {"rewards": .1, 2, 3.}, and must answer {"scores": '),
        (b"[1, 2, 3]", "must answer"),
        (b'{"scores": [1, null, 3]}', "answered the score null, which is no number"),
        (b'{"scores": [1, NaN, 3]}', "the reward 'endpoint' is nan for sample 1"),
        (404, "refused the request: HTTP 404 Not Found: not now"),
    ],
)
def test_what_would_not_change_is_an_error_at_once(server, answer, said):
    server.script = [answer]
    with pytest.raises(RewardError, match=said):
        score(reward(server), samples_of(3))
    assert len(server.requests) == 1


def test_one_batch_that_fails_ends_the_waiting_of_the_others(server):
    server.script = [503, 404]
    began = time.monotonic()
    with pytest.raises(RewardError, match="HTTP 404"):
        score(reward(server, batch_size=1, num_connections=2, backoff=30.0), samples_of(2))
    while any(thread.name.startswith("reward-endpoint") for thread in threading.enumerate()):
        time.sleep(0.01)
        assert time.monotonic() < began + 15
    assert len(server.requests) == 2


def test_waits_double(server):
    server.script = [503] * 3
    score(reward(server, backoff=0.1, max_attempts=4), samples_of(1))
    times = [when for _, _, when in server.requests]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert least <= gap < least + 0.3
    waits = delays(1.0, 5.0)
    assert [next(waits) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_requests_are_under_way_while_other_rewards_compute(server):
    class Waits(Fixed):
        def forward(self, samples):
            deadline = time.monotonic() + 20
            while not server.requests and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.requests
            return super().forward(samples)

    total = score(WeightedReward({"model": Waits([1, 1, 1]), "served": reward(server)}), samples_of(3)).total
    assert total.tolist() == [1.0, 2.0, 3.0]


def test_what_cannot_be_sent_is_said(server):
    with pytest.raises(
        RewardError, match="columns cannot be sent as JSON .*object.*list those to send in columns"
    ):
        score(reward(server), samples_of(1, thing=[object()]))
    with pytest.raises(RewardError, match="the data has no column 'answer'; it has other"):
        score(reward(server, columns=["answer"]), samples_of(1, other=[1]))
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "file:///etc/hosts"}, "must begin with http"),
        ({"url": "http://localhost", "max_attempts": 0}, "max_attempts must be at least 1, got 0"),
        ({"url": "http://localhost", "timeout": 0}, "timeout must be positive"),
        ({"url": "http://localhost", "token_env": "NO_SUCH_VARIABLE"}, "no such environment variable"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        EndpointReward(**settings)
