"""The server as its clients see it: OpenAI's own, and others that misbehave."""

import asyncio
import json
import threading
import time

import numpy as np
import openai
import pytest

from lory_jax.generation.merge import merged_params
from lory_jax.parallel import make_mesh
from tests.support.served import head, serving, wait_until
from tests.verbs.test_api import TEXT, make_model

DOMAIN_YxE = np.random.default_rng(1).dirichlet([0.2] * 4, 2).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def served(model):
    with serving(model, {"code": DOMAIN_YxE}) as found:
        yield found


@pytest.fixture(scope="module")
def slow(model):
    """Two slots and a queue of two texts, 20 ms a token."""
    with serving(model, slots=2, queue=2, step_seconds=0.02) as found:
        yield found


def client(served, **options):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options)


def complete(served, prompt=TEXT[:9], **fields):
    fields = dict(model="lory", temperature=0, max_tokens=12) | fields
    return client(served).completions.create(prompt=prompt, **fields)


# ---------------------------------------------------------------- answers


def test_a_completion_is_what_the_model_generates(served, model):
    prompts = [TEXT[:9], "", TEXT[10:30]]
    expected = model.generate(prompts, temperature=0.0, max_new_tokens=12)
    assert [complete(served, prompt).choices[0].text for prompt in prompts] == expected
    together = complete(served, prompts)
    assert [choice.text for choice in together.choices] == expected
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    ids = [model.encode(prompt) for prompt in prompts]
    assert [choice.text for choice in complete(served, ids).choices] == expected
    usage = together.usage
    assert usage.prompt_tokens == sum(map(len, ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 3 <= usage.completion_tokens <= 36


def test_a_stream_adds_up_to_the_completion(served):
    whole = complete(served, n=3, temperature=1, seed=5)
    events = list(
        complete(
            served, n=3, temperature=1, seed=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    texts, reasons = [""] * 3, {}
    for event in events[:-1]:
        (choice,) = event.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) > 1
    assert [reasons[n] for n in range(3)] == [choice.finish_reason for choice in whole.choices]
    assert len(events) > 6


def test_the_seed_and_the_stop_text_decide(served):
    one, same, other = (
        complete(served, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)
    )
    assert one == same != other
    whole = complete(served).choices[0].text
    cut = complete(served, stop=[whole[3:5], "never there"]).choices[0]
    assert cut.text == whole[: whole.index(whole[3:5])] and cut.finish_reason == "stop"


def test_a_domain_decodes_the_model_that_is_merged_for_it(served, model):
    mesh = make_mesh(1, 1, 1, [next(iter(model.params["embedding"].devices()))])
    dense = make_model(0)
    dense.params = merged_params(model.config, model.params, DOMAIN_YxE, mesh)
    expected = dense.generate(TEXT[:9], temperature=0.0, max_new_tokens=12)[0]
    assert complete(served, model="lory:code").choices[0].text == expected
    assert complete(served).choices[0].text != expected


def test_the_models_are_listed(served):
    assert [model.id for model in client(served).models.list()] == ["lory", "lory:code"]
    assert client(served).models.retrieve("lory:code").id == "lory:code"
    with pytest.raises(openai.NotFoundError, match="must be one of lory, lory:code"):
        complete(served, model="gpt-4")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "must be a JSON object; got list"),
        ({"prompt": None}, "prompt: must be a text"),
        ({"prompt": []}, "prompt: must be a text"),
        ({"prompt": [[1, 2], 3]}, "prompt: got 3"),
        ({"prompt": [300]}, "prompt: got 300"),
        ({"prompt": "\ud800"}, "valid Unicode"),
        ({"temperature": "hot"}, "temperature: got 'hot'; must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"n": True}, "n: got True"),
        ({"n": 100, "prompt": ["a", "b"]}, "at most 128 choices"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 10**30}, "max_tokens: got 1000"),
        ({"stop": ["a", ""]}, "stop: got"),
        ({"stream": 1}, "stream: got 1"),
        ({"logprobs": 3}, "logprobs is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"promt": "a"}, "unknown field 'promt'"),
    ],
    ids=str,
)
def test_a_bad_body_is_answered_with_what_is_wrong(served, body, message):
    if isinstance(body, dict):
        body = json.dumps({"model": "lory", "prompt": "a"} | body).encode()
    status, answer = served.send(body)
    assert status == 400 and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_prompt_beyond_the_context_is_refused(served):
    for prompt, tokens in ((TEXT * 5, 1), (TEXT[:5], 64)):
        with pytest.raises(openai.BadRequestError, match="they must be at most 64") as caught:
            complete(served, prompt, max_tokens=tokens)
        assert caught.value.code == "context_length_exceeded"
    room = 64 - len(served.engine.model.encode(TEXT[:5]))
    assert complete(served, TEXT[:5], max_tokens=room).usage.total_tokens <= 64


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (dict(body=b"x" * (2**20 + 1)), 413),
        (dict(body=b"{}", Content_Type="text/plain"), 415),
        (dict(body=b"", path="/v1/nothing", method="GET"), 404),
        (dict(body=b"", method="GET"), 405),
    ],
    ids=str,
)
def test_other_mistakes_have_their_status(served, request_of, status):
    found, answer = served.send(**request_of)
    assert found == status and answer["error"]["message"]


def test_other_names_of_the_host_are_refused(served):
    """So no page on the web can read answers through a name that leads to this machine."""
    with served.connect() as connection:
        connection.sendall(head(0, "/v1/models", "GET", Host="evil.example"))
        assert connection.recv(100).split()[1] == b"400"


# ---------------------------------------------------------------- many clients, and bad ones


def test_200_concurrent_requests_are_answered_as_if_alone(served, model):
    prompts = [TEXT[number % 7 : number % 7 + number % 11] for number in range(200)]
    alone = {p: model.generate(p, temperature=0.0, max_new_tokens=9)[0] for p in set(prompts)}

    async def all_at_once():
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as ours:
            create = ours.completions.create
            fields = dict(model="lory", temperature=0, max_tokens=9)
            return await asyncio.gather(*(create(prompt=p, **fields) for p in prompts))

    found = asyncio.run(all_at_once())
    assert [answer.choices[0].text for answer in found] == [alone[prompt] for prompt in prompts]
    assert served.engine.active == served.engine.waiting == 0


def test_more_than_the_queue_holds_is_refused_with_429(slow):
    with pytest.raises(openai.RateLimitError, match="do not fit into the queue of 2") as caught:
        complete(slow, n=5, max_tokens=40)
    assert caught.value.response.headers["retry-after"] == "1"
    assert len(complete(slow, n=4, max_tokens=2).choices) == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(slow, stream):
    body = {"model": "lory", "prompt": "a", "max_tokens": 60, "n": 3, "stream": stream}
    data = json.dumps(body | {"temperature": 2, "seed": 1}).encode()
    connection = slow.connect()
    connection.sendall(head(len(data)) + data)
    wait_until(lambda: slow.engine.active == 2 and slow.engine.waiting == 1)
    connection.close()
    begun = time.monotonic()
    wait_until(lambda: slow.engine.active == slow.engine.waiting == 0)
    assert time.monotonic() - begun < 0.8 * 60 * 0.02  # before the texts would have ended
    status = 'status="499"'
    wait_until(lambda: status in slow.handlers.metrics.text().decode())
    assert complete(slow, max_tokens=2).choices


def test_slow_clients_do_not_hold_up_others(slow):
    """One sends its body byte by byte, one never reads its stream."""
    data = json.dumps({"model": "lory", "prompt": "a", "max_tokens": 3}).encode()
    sender, deaf = slow.connect(), slow.connect()
    sender.sendall(head(len(data)))
    streamed = json.dumps({"model": "lory", "prompt": "a", "max_tokens": 60, "stream": True})
    deaf.sendall(head(len(streamed)) + streamed.encode())
    answers = []

    def send_slowly():
        for byte in data:
            sender.sendall(bytes([byte]))
            time.sleep(0.01)
        answers.append(sender.recv(65536))

    thread = threading.Thread(target=send_slowly)
    thread.start()
    assert complete(slow, max_tokens=3).choices
    assert thread.is_alive()
    thread.join()
    assert answers[0].startswith(b"HTTP/1.1 200")
    wait_until(lambda: slow.engine.active == 0)  # though nobody has read the stream
    sender.close()
    deaf.close()


def test_a_body_that_never_ends_is_given_up(served, monkeypatch):
    monkeypatch.setattr("lory_jax.serving.handlers.BODY_SECONDS", 0.1)
    with served.connect() as connection:
        connection.sendall(head(10) + b"{")
        assert connection.recv(100).split()[1] == b"408"


# ---------------------------------------------------------------- for those who run it


def test_health_and_metrics(served):
    assert served.send(b"", "/health", "GET") == (200, {"status": "ok"})
    complete(served, model="lory:code", max_tokens=3)
    with served.connect() as connection:
        connection.sendall(head(0, "/metrics", "GET"))
        text = b""
        while part := connection.recv(65536):
            text += part
    lines = text.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("lory_"))
    assert float(values['lory_requests_total{model="lory:code",status="200"}']) >= 1
    assert float(values["lory_generated_tokens_total"]) >= 3
    assert float(values["lory_slots"]) == 8
    assert float(values["lory_request_seconds_count"]) >= 1


def test_a_failed_engine_is_reported(model):
    with serving(model, step_seconds=0.01) as served:

        def fail(arriving):
            raise RuntimeError("no memory left")

        served.engine._texts.step = fail
        with pytest.raises(openai.InternalServerError, match="stopped before the text was"):
            complete(served)
        assert served.send(b"", "/health", "GET") == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            complete(served)
        assert "no memory left" in served.engine.failure


def test_a_stopping_server_finishes_what_was_begun(model):
    with serving(model, step_seconds=0.02) as served:
        stream = complete(served, max_tokens=30, temperature=2, seed=1, stream=True)
        first = next(iter(stream))
        served.handlers.is_stopping = True
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            complete(served)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason


def test_the_strip_has_the_weights_of_every_segment(served, model):
    prompt, text = TEXT[:20], TEXT[20:50]
    body = json.dumps({"model": "lory", "prompt": prompt, "text": text}).encode()
    status, found = served.send(body, "/routing")
    assert status == 200 and found["experts"] == 4 and found["segment_length"] == 8
    assert "".join(segment["text"] for segment in found["segments"]).endswith(text)
    ids = [model.encode(prompt + text)]
    weights = model.routing_weights(ids)[:, 0]  # [layers, segments, experts]
    for n, segment in enumerate(found["segments"]):
        np.testing.assert_allclose(segment["weights"], weights[:, n], atol=1e-4)
    np.testing.assert_allclose(np.sum(found["used"], axis=-1), 1, atol=1e-3)
    domain = json.dumps({"model": "lory:code", "prompt": prompt, "text": text}).encode()
    np.testing.assert_allclose(served.send(domain, "/routing")[1]["used"], DOMAIN_YxE, atol=1e-4)
