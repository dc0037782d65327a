"""What README.md says is what happens: its commands and its code run, its tables are the code's."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.readme import block, blocks, example_with, python_block
from harness.serving import (
    EXAMPLE,
    KEY,
    NAME,
    DeployError,
    deployed,
    free_port,
    hayhooks,
    load_wrapper,
    running,
    wait_until,
)
from harness.upstream import Reply, Upstream
from hayhooks.settings import AppSettings
from kubernetes_validate.utils import validate as validate_manifest
from packaging.requirements import Requirement

README = (EXAMPLE / "README.md").read_text()
SHELL = [block for block in blocks() if block.language == "bash"]
WORKERS = block("bash", name="workers")
HAYSTACK_3 = Path(sys.prefix) / "haystack3"


# The commands


@dataclass
class Checkout:
    """A user's checkout, with all that must not be uploaded, and an empty home."""

    folder: Path
    environment: dict[str, str]
    port: int

    @property
    def log(self) -> str:
        return (self.folder.parent / "server.log").read_text()

    def here(self, code: str) -> str:
        return code.replace("localhost:1416", f"127.0.0.1:{self.port}")

    def run(self, code: str) -> str:
        """Run a block as it stands, but for the port."""
        command = ["sh", "-euc", self.here(code)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    @contextlib.contextmanager
    def serve(self, code: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a block that ends in `hayhooks run` until this block is left."""
        command = ["sh", "-euc", code.replace("hayhooks run", "exec hayhooks run")]
        url = f"http://127.0.0.1:{self.port}/status"
        with (
            (self.folder.parent / "server.log").open("wb") as log,
            running(
                command, url, cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            ) as server,
        ):
            yield server


@pytest.fixture
def checkout(tmp_path: Path, upstream: Upstream) -> Checkout:
    folder, home, port = tmp_path / "checkout", tmp_path / "home", free_port()
    for path in ("pipeline_wrapper.py", "requirements.txt", "README.md", ".env.example"):
        folder.mkdir(exist_ok=True)
        shutil.copy(EXAMPLE / path, folder)
    for secret in (".git/config", ".venv/lib/secret.py", "tests/secret.py"):
        (folder / secret).parent.mkdir(parents=True)
        (folder / secret).write_text("SECRET = 1")
    example = folder / ".env.example"
    example.write_text(example.read_text().replace("OPENAI_API_KEY=", f"OPENAI_API_KEY={KEY}"))
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "HAYHOOKS_HOST": "127.0.0.1",
        "HAYHOOKS_PORT": str(port),
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "OPENAI_BASE_URL": upstream.url,
    }
    return Checkout(folder, environment, port)


def test_the_blocks_serve_the_example_and_ask_it(checkout: Checkout, upstream: Upstream) -> None:
    install = block("bash", name="by hand").splitlines(keepends=True)
    assert [line.split(maxsplit=2)[0] for line in install[:3]] == ["python3", ".", "pip"]
    with checkout.serve("".join(install[3:])):
        ask_all(checkout)
    assert {received.headers["authorization"] for received in upstream.received} == {f"Bearer {KEY}"}
    assert not (checkout.folder / "pipelines").exists()


def test_the_remove_block_removes_what_the_demo_installed(checkout: Checkout) -> None:
    cache = Path(checkout.environment["HOME"]) / ".cache"
    (cache / NAME / "demo-1").mkdir(parents=True)
    checkout.run(block("bash", name="remove"))
    assert list(cache.iterdir()) == []


def ask_all(checkout: Checkout) -> None:
    """Ask as the README does: with curl, where there is one, and with the OpenAI SDK."""
    curl = [block.code for block in SHELL if block.code.startswith("curl")]
    assert len(curl) == 3
    if shutil.which("curl"):
        stream, run, status = (checkout.run(code) for code in curl)
        assert stream.count("data: {") == 6
        assert run == '{"result":"Hello, world!"}'
        assert NAME in status
    client = checkout.here(python_block("from openai import OpenAI"))
    answer = subprocess.run([sys.executable, "-c", client], check=True, capture_output=True, text=True).stdout
    assert answer == "Hello, world!"


def test_the_deploy_block_uploads_the_wrapper_alone(checkout: Checkout) -> None:
    checkout.run("cp .env.example .env")
    deploy = block("bash", name="deploy")
    with checkout.serve("hayhooks run"):
        checkout.run(deploy)
        checkout.run(deploy)  # a second time, as after a change
        ask_all(checkout)
        with pytest.raises(subprocess.CalledProcessError) as refused:
            checkout.run(deploy.replace(" --overwrite", ""))
        [symptom] = re.findall(r"^\| `(Pipeline .+ already exists)`", README, re.MULTILINE)
        assert symptom in " ".join(f"{refused.value.stdout} {refused.value.stderr}".split())
    pipelines = Path(checkout.environment["HOME"]) / "pipelines"
    arrived = [path.relative_to(pipelines) for path in pipelines.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert arrived == [Path(NAME) / "pipeline_wrapper.py"]


def test_the_workers_block_serves_from_every_worker(checkout: Checkout) -> None:
    checkout.run("cp .env.example .env")
    with checkout.serve(WORKERS):
        wait_until(lambda: checkout.log.count("Application startup complete") == 2, "two workers")
        url = f"http://127.0.0.1:{checkout.port}/v1/chat/completions"
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
        assert {httpx.post(url, json=body, timeout=60).status_code for _ in range(20)} == {200}
        assert len(set(re.findall(r"Started server process \[\x1b\[36m(\d+)", checkout.log))) == 2


def dockerfile() -> dict[str, str]:
    """Return the Dockerfile's instructions, of which each comes once."""
    lines = block("dockerfile").splitlines()
    instructions = dict(line.split(" ", 1) for line in lines)
    assert len(instructions) == len(lines)
    return instructions


@pytest.mark.skipif(not HAYSTACK_3.exists(), reason="one environment of the two is enough: ./tests/run test runs it")
def test_the_container_serves_the_example(upstream: Upstream, tmp_path: Path) -> None:
    instructions = dockerfile()
    image, app = tmp_path / "image", tmp_path / "app"
    subprocess.run([sys.executable, "-m", "venv", image], check=True)
    environment = {"PATH": f"{image}/bin{os.pathsep}{os.environ['PATH']}", "HOME": "/nonexistent"}
    install = {**os.environ, **environment, "PIP_NO_COMPILE": "1", "VIRTUAL_ENV": str(image)}
    if uv := shutil.which("uv", path=sysconfig.get_path("scripts")):  # installs the same in a tenth of the time
        (image / "bin" / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(uv)} pip "$@"\n')
    subprocess.run(["sh", "-euc", instructions["RUN"]], env=install, check=True)
    copied, folder = instructions["COPY"].replace("/app", str(app)).split()
    Path(folder).mkdir(parents=True)
    shutil.copy(EXAMPLE / copied, folder)
    port = free_port()
    command = [part.replace("/app", str(app)) for part in json.loads(instructions["CMD"])]
    command[0] = str(image / "bin" / command[0])
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "HAYHOOKS_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/status", cwd=app, env={**environment, **variables}):
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"


def test_the_versions_of_the_container_are_in_the_ranges() -> None:
    pinned = dict(re.findall(r"([a-z-]+)==(\S+)", dockerfile()["RUN"]))
    for line in (EXAMPLE / "requirements.txt").read_text().splitlines():
        requirement = Requirement(line)
        assert pinned.pop(requirement.name) in requirement.specifier
    assert not pinned


def test_the_manifest_is_what_kubernetes_takes() -> None:
    manifests = list(yaml.safe_load_all(block("yaml", name="kubernetes")))
    assert [manifest["kind"] for manifest in manifests] == ["Deployment", "Service"]
    for manifest in manifests:
        validate_manifest(manifest, "1.30", strict=True)
    pod = manifests[0]["spec"]["template"]["spec"]
    variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(variables["HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT"])
    assert set(variables) <= set(VARIABLES)
    assert manifests[1]["spec"]["selector"] == manifests[0]["spec"]["template"]["metadata"]["labels"]


def test_the_app_of_ones_own_authenticates_and_hears_stop(checkout: Checkout, upstream: Upstream) -> None:
    (checkout.folder / "app.py").write_text(python_block("create_app"))
    checkout.run(f"mkdir -p pipelines/{NAME}; cp pipeline_wrapper.py pipelines/{NAME}")
    checkout.environment.update(CLIENT_KEY="geheim", OPENAI_API_KEY=KEY, HAYHOOKS_PIPELINES_DIR="pipelines")
    url = f"http://127.0.0.1:{checkout.port}"
    client = httpx.Client(base_url=url, timeout=60)
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    python = shlex.quote(sys.executable)
    with subprocess.Popen(
        ["sh", "-euc", f"exec {python} app.py"], cwd=checkout.folder, env=checkout.environment
    ) as app:
        try:
            wait_until(lambda: answers(client), "the app")
            assert client.post("/v1/chat/completions", json=body).status_code == 401
            assert not upstream.received
            headers = {"Authorization": "Bearer geheim"}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.post("/deploy_files", headers=headers, json={}).status_code == 404
            upstream.reply = Reply(["token "] * 1000, pace=0.02)
            with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                assert any(b"token " in content for content in response.iter_raw())
            upstream.wait_until(lambda: upstream.received[0].over)
            assert upstream.received[0].left
        finally:
            app.terminate()


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.ConnectError):
        return client.get("/status").status_code == 200
    return False


def test_the_commands_of_the_script_are_in_the_readmes() -> None:
    usage = subprocess.run([EXAMPLE / "tests" / "run", "--help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    named = re.findall(r"\./tests/run (\w+)", README + (EXAMPLE / "tests" / "README.md").read_text())
    assert set(named) == set(re.findall(r"\./tests/run (\w+)", usage))


def test_without_a_key_the_deploy_says_what_troubleshooting_shows() -> None:
    [symptom] = re.findall(r"^\| `(OPENAI_API_KEY [^`]+)` at the deploy", README, re.MULTILINE)
    with hayhooks() as server, pytest.raises(DeployError) as refused:
        server.deploy()
    assert symptom in " ".join(str(refused.value).split())


# The code


def test_the_plain_version_is_printed_whole() -> None:
    plain = (EXAMPLE / "tests" / "harness" / "plain_wrapper.py").read_text()
    assert plain in [block.code for block in blocks()]


def test_without_the_argument_hayhooks_raises(upstream: Upstream, tmp_path: Path) -> None:
    argument = "            allow_sync_streaming_callbacks=True,\n"
    code, strict = python_block("get_last_user_message"), tmp_path / "strict.py"
    assert argument in code
    strict.write_text(code.replace(argument, ""))
    [error] = [block.code for block in blocks() if block.code.startswith("ValueError: ")]
    sentence = error.removeprefix("ValueError: ").split(" …")[0]
    with deployed(wrapper=strict, OPENAI_BASE_URL=upstream.url) as server:
        assert sentence in Chat(server).post().text


def test_a_default_system_prompt_and_temperature(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "defaults.py"
    file.write_text(example_with(python_block("generation_kwargs={")))
    with deployed(wrapper=file, OPENAI_BASE_URL=upstream.url) as server:
        Chat(server).post()
        Chat(server).post([{"role": "system", "content": "Rhyme."}, *HI], temperature=1)
    default, sent = (one.body for one in upstream.received)
    assert (default["messages"][0]["content"], default["temperature"]) == ("Answer in one sentence.", 0.2)
    assert (sent["messages"][0]["content"], sent["temperature"]) == ("Rhyme.", 1)


def test_a_retriever_in_front_of_the_prompt(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "rag.py"
    file.write_text(example_with(python_block("InMemoryBM25Retriever")))
    question = "When is lunch?"
    with deployed(wrapper=file, OPENAI_BASE_URL=upstream.url) as server:
        chat = Chat(server)
        assert text_of(chat.events(question)) == "Hello, world!"
        history = [
            {"role": "user", "content": "When does the office open?"},
            {"role": "assistant", "content": "The office opens at nine."},
        ]
        chat.post([*history, {"role": "user", "content": [{"type": "text", "text": question}]}])
    first, second = (one.body["messages"][0]["content"] for one in upstream.received)
    assert first == f"Lunch is at noon.\n\n{question}"
    assert second.startswith("Lunch is at noon.")


def test_two_components_stream_and_stop(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(example_with(python_block('"second"')))
    with deployed(wrapper=file, OPENAI_BASE_URL=upstream.url) as server:
        chat = Chat(server)
        assert sorted(texts_of(chat.events(temperature=0.5))) == sorted(["Hello", ", ", "world", "!"] * 2)
        assert [one.body["temperature"] for one in upstream.received] == [0.5, 0.5]
        upstream.forget()
        upstream.reply = Reply([f"{number} " for number in range(10_000)], pace=0.02)
        with chat.open() as events:
            for _ in range(6):
                next(texts_of(events))
        upstream.wait_until(lambda: len(upstream.received) == 2 and all(one.over for one in upstream.received))
        assert all(one.left for one in upstream.received)
        # One that fails while the other has finished is a failure.
        upstream.forget()
        upstream.reply = lambda body: (
            Reply() if len(upstream.received) % 2 else Reply(["x"] * 50, then="break", pace=0.01)
        )
        assert "error" in chat.events()[-1]


def test_azure_openai_generator_takes_its_place(upstream: Upstream, tmp_path: Path) -> None:
    azure = tmp_path / "azure.py"
    azure.write_text(example_with(python_block("AzureOpenAIGenerator")))
    endpoint = upstream.url.removesuffix("/v1")
    with deployed(wrapper=azure, OPENAI_BASE_URL=endpoint, OPENAI_MODEL="my-deployment") as server:
        chat = Chat(server)
        assert text_of(chat.events()) == "Hello, world!"
        assert upstream.received[0].path == "/openai/deployments/my-deployment/chat/completions"
        assert upstream.received[0].headers["api-key"] == KEY
        upstream.reply = Reply(["token "] * 1000, pace=0.02)
        with chat.open() as events:
            next(texts_of(events))
        upstream.wait_until(lambda: upstream.received[1].over)
        assert upstream.received[1].left
        upstream.reply = Reply(status=401, error={"error": {"message": "No."}})
        assert chat.post(stream=True).json() == {"detail": "The upstream refused the server's credentials."}


def test_a_component_of_ones_own_streams_and_stops(tmp_path: Path) -> None:
    own, left = tmp_path / "own.py", tmp_path / "left"
    code = python_block("class Speaker")
    own.write_text(example_with(code))
    with deployed(wrapper=own) as server:
        spoken = Chat(server).events("one two three")
        assert list(texts_of(spoken)) == ["one ", "two ", "three "]
        assert finish_reasons(spoken) == []
        [whole] = Chat(server).post("one two").json()["choices"]
        assert (whole["message"]["content"], whole["finish_reason"]) == ("one two ", None)

    loop, end = "for word in words:", "        return {"
    assert loop in code
    assert end in code

    # The same with a failure, before the first word.
    own.write_text(example_with(code.replace(loop, f"raise RuntimeError('my secret')\n        {loop}")))
    with deployed(wrapper=own) as server:
        for stream in (True, False):
            failed = Chat(server).post("one two", stream=stream)
            assert (failed.status_code, failed.json()) == (502, {"detail": "The answer could not be completed."})

    # The same with a loop that does not end by itself, and leaves a file behind when it does.
    endless = code.replace(loop, "for word in iter(lambda: words[0], None):")
    own.write_text(example_with(endless.replace(end, f"        open({str(left)!r}, 'w').close()\n{end}")))
    with deployed(wrapper=own) as server:
        with Chat(server).open("word") as events:
            next(texts_of(events))
        wait_until(left.exists, "the component to stop")


def test_a_pipeline_from_yaml_takes_its_place(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "pipeline_wrapper.py").write_text(example_with(python_block("AsyncPipeline.loads")))
    definition = block("yaml", name="pipeline").replace(
        "model: gpt-5-mini", f"model: gpt-5-mini\n      api_base_url: {upstream.url}"
    )
    (tmp_path / "pipeline.yml").write_text(definition)
    with deployed(wrapper=tmp_path) as server:
        chat = Chat(server)
        assert text_of(chat.events([{"role": "system", "content": "Be brief."}, *HI])) == "Hello, world!"
        assert upstream.received[0].body["messages"] == [{"role": "system", "content": "Be brief."}, *HI]
        upstream.reply = Reply(["token "] * 1000, pace=0.02)
        with chat.open() as events:
            next(texts_of(events))
        upstream.wait_until(lambda: upstream.received[1].over)
        assert upstream.received[1].left
        upstream.reply = Reply(then="break")
        assert "error" in chat.events()[-1]


HI = [{"role": "user", "content": "Hi"}]


# The move to Haystack 3

needs_haystack_3 = pytest.mark.skipif(
    not HAYSTACK_3.exists(), reason="Haystack 3 is missing: ./tests/run test brings it"
)


def listing(haystack: int) -> str:
    """Return the listing for a release of Haystack; the second step is the comment of one line."""
    code = python_block("OpenAIChatGenerator")
    [(line, second)] = re.findall(r"^(.*  # step 2: (.*))$", code, re.MULTILINE)
    return code.replace(line, second) if haystack == 3 else code


def on(haystack: int) -> str:
    """Return a path that has this release before the installed one."""
    return str(HAYSTACK_3) if haystack == 3 else ""


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=needs_haystack_3)])
def step(
    request: pytest.FixtureRequest, shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Chat]]:
    """A client of the listing, and the release of Haystack that it runs on."""
    file = tmp_path_factory.mktemp("step") / "step.py"
    file.write_text(listing(request.param))
    with deployed(wrapper=file, OPENAI_BASE_URL=shared_upstream.url, PYTHONPATH=on(request.param)) as server:
        yield request.param, Chat(server, done=False)


def test_a_step_streams_a_conversation(step: tuple[int, Chat], upstream: Upstream) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{{ 7*7 }}"},
        {"role": "assistant", "content": "49"},
        {"role": "user", "content": "And 8*8?"},
    ]
    upstream.reply = Reply(tokens=["one", "two"], gated=True)
    upstream.release()
    with step[1].open(conversation) as events:
        tokens = texts_of(events)
        for token in ("one", "two"):
            assert next(tokens) == token
            upstream.release()
    assert upstream.received[0].body["messages"] == conversation


def test_a_client_that_leaves_stops_the_upstream_from_step_2_on(step: tuple[int, Chat], upstream: Upstream) -> None:
    haystack, chat = step
    upstream.reply = Reply(tokens=["token "] * 50, pace=0.05)
    with chat.open() as events:
        next(texts_of(events))
    upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left == (haystack == 3)


# The tables


VARIABLES = {
    name: default
    for names, default in re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (.+?) \|", README, re.MULTILINE)
    for name in re.findall("[A-Z_]{2,}", names)
}


def test_the_variables_are_those_of_the_code() -> None:
    fields = load_wrapper().Settings.model_fields
    example = dict(re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE))
    ours = {name: default for name, default in VARIABLES.items() if not name.startswith("HAYHOOKS")}
    assert set(ours) == set(fields) == set(example) - {"HAYHOOKS_PIPELINES_DIR"}
    assert ours.pop("OPENAI_API_KEY") == "required"
    assert example["OPENAI_API_KEY"] == ""
    for name, default in ours.items():
        assert default.strip("`") == example[name] == str(fields[name].default)


def test_hayhooks_variables_have_the_defaults_that_are_printed() -> None:
    settings = AppSettings(_env_file=None)
    printed = {name: default for name, default in VARIABLES.items() if name.startswith("HAYHOOKS")}
    assert printed.pop("HAYHOOKS_HOST") == f"`{settings.host}`, `{settings.port}`" == printed.pop("HAYHOOKS_PORT")
    assert printed.pop("HAYHOOKS_PIPELINES_DIR") == "`./pipelines`"
    assert settings.pipelines_dir == str(Path.cwd() / "pipelines")
    assert printed.pop("HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT") == f"`{settings.graceful_shutdown_timeout}`"
    assert printed.pop("HAYHOOKS_CORS_ALLOW_ORIGINS") == f"`{json.dumps(settings.cors_allow_origins)}`"
    assert not printed


def test_the_forwarded_fields_are_those_of_the_code() -> None:
    [row] = [line for line in README.splitlines() if "| forwarded unless null" in line]
    assert tuple(re.findall("`(\\w+)`", row.split("|")[1])) == load_wrapper().PARAMETERS


def rows_below(heading: str) -> list[list[str]]:
    """Return the cells of a table, which the beginning of its heading names."""
    table = README[README.index(heading) :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def test_the_costs_are_those_of_the_benchmark() -> None:
    report = (EXAMPLE / "tests" / "benchmark.md").read_text()
    first, chunks, servers = report.split("| --- |")[1:]

    def row(table: str, name: str) -> list[str]:
        [cells] = re.findall(rf"^\| {name} \| (.+) \|$", table, re.MULTILINE)
        return [str(cell.split(" / ")[-1].strip()) for cell in cells.split("|")]

    def seconds(streams: int) -> list[str]:
        return [
            f"{int(cell.removesuffix(' ms').replace(',', '')) / 1000:.1f} s" for cell in row(first, str(streams))[1:]
        ]

    per_server = [row(servers, name) for name in ("the plain version", "this example", "the async way")]
    assert [cells[1:] for cells in rows_below("| | plain version | this example | async way |")] == [
        seconds(100),
        seconds(300),
        row(chunks, "100")[1:],
        [cells[2] for cells in per_server],
        [cells[1] for cells in per_server],
    ]
    for version in re.findall(r"[a-z-]+ \d+\.\d+\.\d+", report.split("\n\n")[1]):
        assert version in README


FAILURES = rows_below("| the upstream | status |")


@pytest.mark.parametrize("row", FAILURES, ids=[cause for cause, *_ in FAILURES])
def test_a_failure_is_what_the_table_says(small: Chat, upstream: Upstream, row: list[str]) -> None:
    cause, answered, told = row
    sentence = "You asked too much."
    detail = sentence if told == "the upstream's own sentence" else told.strip("`")
    statuses = [int(status) for status in re.findall(r"\d{3}", cause)]
    with contextlib.ExitStack() as stack:
        if "OPENAI_TIMEOUT" in cause:
            upstream.reply = Reply(tokens=[], role=False, then="stall")
        elif "MAX_CONCURRENT_STREAMS" in cause:
            upstream.reply = Reply(gated=True)
            streams = [stack.enter_context(small.open()) for _ in range(8)]
            assert all(map(next, streams))
        else:
            assert statuses or cause == "all else"
            statuses = statuses or [500]
        for status in statuses or [200]:
            if status != 200:
                upstream.reply = failing = Reply(status=status, error={"error": {"message": sentence}})
                failing.headers["Retry-After"] = "7"
            for stream in (True, False):
                failed = small.post(stream=stream)
                assert failed.json() == {"detail": detail}
                assert failed.status_code == (status if answered.startswith("the same") else int(answered[:3]))
                waits = failed.headers.get("Retry-After")
                assert waits == ("1" if "Retry-After: 1" in answered else "7" if "Retry-After" in answered else None)


def test_an_answer_has_the_fields_that_are_printed(chat: Chat, upstream: Upstream) -> None:
    [event] = [block.code for block in blocks() if block.code.startswith('data: {"id"')]
    printed = json.loads(event.removeprefix("data: "))
    [sent] = [event for event in chat.events() if text_of([event]) == "Hello"]
    assert {**printed, "id": sent["id"], "created": sent["created"]} == sent
    [completion] = [block.code for block in blocks() if block.code.startswith('{"id"')]
    printed, whole = json.loads(completion), chat.post().json()
    assert {**printed, "id": whole["id"], "created": whole["created"]} == without_nulls(whole)
    [failure] = [block.code for block in blocks() if block.code.startswith('data: {"error"')]
    upstream.reply = Reply(then="break")
    assert chat.events()[-1] == json.loads(failure.removeprefix("data: "))


def without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return value


def test_nginx_passes_only_what_clients_need(chat: Chat) -> None:
    [passed] = re.findall(r"location ~ (\S+) \{", block("nginx"))
    paths = chat.http.get("/openapi.json").json()["paths"]
    assert {path for path in paths if re.search(passed, path)} == {
        "/v1/chat/completions",
        "/v1/models",
        f"/{NAME}/run",
        "/status",
    }


def test_the_unit_starts_hayhooks(checkout: Checkout) -> None:
    [(run, options)] = re.findall(r"ExecStart=/opt/hayhooks/bin/(.+) --host 10.0.0.1 (.+)", block("ini"))
    with checkout.serve(f"{run} {options}".replace("/opt/", f"{checkout.folder}/")):
        assert httpx.get(f"http://127.0.0.1:{checkout.port}/status").status_code == 200


def test_the_last_line_is_the_licence() -> None:
    assert README.endswith("\nApache-2.0, as Hayhooks.\n")
