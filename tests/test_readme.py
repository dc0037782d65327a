"""What the two READMEs show is what happens: their recipes, commands and servers run, their tables are the code's."""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from demo import QUESTIONS
from harness.client import Chat, events_of, text_of, texts_of
from harness.environments import unavailable
from harness.local_model import MODEL
from harness.other_environments import ONE_RUN_IS_ENOUGH, served_from, write_pipelines
from harness.readme import BLOCKS, MANUAL, README, block, starting
from harness.serving import EXAMPLE, KEY, NAME, Server, copy_wrapper, deployed, free_port, hayhooks, running, wait_until
from harness.upstream import Reply, Upstream
from harness.wire_formats import ollama
from hayhooks.settings import AppSettings
from kubernetes_validate.utils import validate as validate_manifest
from packaging.requirements import Requirement
from packaging.version import Version

from production import Settings
from production.failure import FAILED, TOO_LATE, as_http_exception
from production.request import PARAMETERS
from production.response import NO_SLOT
from production.settings import Limits

HI = [{"role": "user", "content": "Hi"}]
PREFLIGHT = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}  # of a browser
LONG = Reply([f"{number} " for number in range(10_000)], pace=0.02)
HAYSTACK = Version(importlib.metadata.version("haystack-ai"))
NEEDS_2_31 = pytest.mark.skipif(Version("2.31") > HAYSTACK, reason="older Haystacks take no images in messages")


# The recipes


class Named(Chat):
    """A client of one of a server's pipelines."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(server)
        self.name = name

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        return super().request(messages, **{"model": self.name, **body})


def recipes(*names: str, ollama: str = "") -> dict[str, dict[str, str]]:
    """Return the files of recipes by their names, with this URL of Ollama in place of the one that is printed."""
    found = {name: {"pipeline_wrapper.py": block("python", name=f"recipe {name}")} for name in names}
    for name in {"from_yaml", "router"} & set(names):
        found[name]["pipeline.yml"] = block("yaml", name=f"pipeline {name}").replace("http://localhost:11434", ollama)
    return found


def azure(url: str) -> dict[str, str]:
    """Return the example with the manual's line for Azure, and this URL."""
    code = (EXAMPLE / "pipeline_wrapper.py").read_text()
    [old] = re.findall(r"^ +llm = OpenAIGenerator.*$", code, re.MULTILINE)
    new = block("python", name="azure").rstrip().replace("https://YOUR-RESOURCE.openai.azure.com", url)
    return {"pipeline_wrapper.py": code.replace(old, new).replace("import OpenAIG", "import AzureOpenAIG")}


@pytest.fixture(scope="module")
def served(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pipelines")
    names = ("rag", "chat_generator", "from_yaml", "any_component")
    write_pipelines(folder, {**recipes(*names), "azure": azure(shared_upstream.url.removesuffix("/v1"))})
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": shared_upstream.url, "HAYHOOKS_PIPELINES_DIR": str(folder)}
    with hayhooks(AZURE_OPENAI_API_KEY=KEY, HAYHOOKS_STARTUP_DEPLOY_STRATEGY="sequential", **variables) as server:
        yield server


def assert_it_hears_stop(upstream: Upstream) -> None:
    """Check that a server, whose client has left, closes its first connection to the upstream."""
    upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left


def assert_it_serves(chat: Chat, upstream: Upstream) -> None:
    """Check that a pipeline streams, stops with its client, and tells it of a wrong key."""
    upstream.reply = Reply()
    assert text_of(chat.events()) == "Hello, world!"
    upstream.forget()
    upstream.reply = LONG
    with chat.open() as events:
        next(texts_of(events))
    assert_it_hears_stop(upstream)
    upstream.reply = Reply(status=401, error={"error": {"message": "No."}})
    assert chat.post(stream=True).headers["x-should-retry"] == "false"
    upstream.forget()


def test_rag_with_defaults(served: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(served, "rag"), upstream)
    assert chat.post("When is lunch?").status_code == 200
    opening = "The office opens at nine."
    history = [{"role": "user", "content": "Does the office open?"}, {"role": "assistant", "content": opening}]
    question = {"role": "user", "content": [{"type": "text", "text": "When is lunch?"}]}
    chat.post([{"role": "system", "content": "Rhyme."}, *history, question], temperature=0.5)
    default, sent = (one.body for one in upstream.received)
    chat.post("When does the office open?")
    assert upstream.received[-1].body["messages"][-1]["content"] == f"{opening}\n\nWhen does the office open?"
    assert [message["content"] for message in default["messages"]] == [
        "You are a librarian.",
        "Lunch is at noon.\n\nWhen is lunch?",
    ]
    assert (default["temperature"], default["verbosity"]) == (1, "low")
    assert sent["messages"][0]["content"] == "Rhyme."
    assert sent["messages"][1]["content"].startswith("Lunch is at noon.")
    assert (sent["temperature"], sent["verbosity"]) == (0.5, "low")


def test_a_pipeline_from_yaml(served: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(served, "from_yaml"), upstream)
    assert chat.post("{{ 7*7 }}", temperature=0.5).status_code == 200
    assert upstream.received[0].body["messages"][-1]["content"] == "Answer briefly.\n\n{{ 7*7 }}"
    assert upstream.received[0].body["temperature"] == 0.5


@ONE_RUN_IS_ENOUGH
def test_a_router_with_ollama_and_openai(upstream: Upstream) -> None:
    files, variables = recipes("router", ollama=upstream.url.removesuffix("/v1")), {"OPENAI_BASE_URL": upstream.url}
    with served_from("third_party", files, OPENAI_API_KEY=KEY, **variables) as server:
        chat = Named(server, "router")
        for question in ("42", "None", "{{ 7*7 }}"):
            upstream.reply = Reply(wire_format=ollama)
            assert text_of(chat.events(question)) == "Hello, world!"
            assert upstream.received[-1].body["prompt"] == question
        upstream.forget()
        upstream.reply = replace(LONG, wire_format=ollama)
        with chat.open() as events:
            next(texts_of(events))
        assert_it_hears_stop(upstream)
        upstream.reply = Reply()
        assert text_of(chat.events("long " * 50, temperature=0.5)) == "Hello, world!"
        assert upstream.received[-1].body["temperature"] == 0.5


def test_azure(served: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(served, "azure"), upstream)
    assert chat.post(temperature=0.5).status_code == 200
    [received] = upstream.received
    assert received.path == "/openai/deployments/YOUR-DEPLOYMENT/chat/completions"
    assert (received.headers["api-key"], received.body["temperature"]) == (KEY, 0.5)
    upstream.reply = Reply(status=400, error={"error": {"message": f"{KEY} asks too much."}})
    assert chat.post().json() == {"detail": "[key] asks too much."}
    upstream.forget()
    upstream.reply = Reply(status=500, error={"error": {"message": "No."}})
    assert chat.post().status_code == 502
    assert len(upstream.received) == 1  # it leaves retries to its clients


def assert_the_chat_generator_serves(server: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(server, "chat_generator"), upstream)
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    stopped = {"role": "assistant", "content": ""}
    events = chat.events([*turns[:2], stopped, *turns[2:]], temperature=0.5, stream_options={"include_usage": True})
    assert "usage" in events[-1]
    assert upstream.received[0].body["temperature"] == 0.5
    received = [(message["role"], message["content"]) for message in upstream.received[0].body["messages"]]
    assert received == [(turn["role"], turn["content"]) for turn in turns]
    assert chat.post([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).status_code == 200
    default, question = upstream.received[1].body["messages"]
    assert (default["content"], question["content"]) == ("You are a librarian.", "Hi")
    assert chat.post(" ").status_code == 400


def assert_any_component_serves(server: Server) -> None:
    chat = Named(server, "any_component")
    words = "word " * 2_000
    texts = list(texts_of(chat.events(words.strip())))
    assert "".join(texts) == words
    assert len(texts) < 2_000  # `stoppable` joins chunks for a component that is faster than its client
    assert chat.post("one two").json()["choices"][0]["finish_reason"] == "stop"


@NEEDS_2_31
def test_the_chat_generator_on_haystack_2(served: Server, upstream: Upstream) -> None:
    assert_the_chat_generator_serves(served, upstream)


def test_any_component_on_haystack_2(served: Server) -> None:
    assert_any_component_serves(served)


@ONE_RUN_IS_ENOUGH
def test_the_recipes_for_both_on_haystack_3(upstream: Upstream) -> None:
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}
    with served_from("haystack_3", recipes("chat_generator", "any_component"), **variables) as server:
        assert_the_chat_generator_serves(server, upstream)
        assert_any_component_serves(server)


# The commands


class Checkout:
    """A user's checkout, with all that must not be uploaded, and an empty home."""

    def __init__(self, folder: Path, upstream: Upstream) -> None:
        self.folder, self.home, self.port = folder / "checkout", folder / "home", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.home.mkdir()
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
            "HAYHOOKS_HOST": "127.0.0.1",
            "HAYHOOKS_PORT": str(self.port),
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            "OPENAI_BASE_URL": upstream.url,
        }

    def run(self, code: str) -> str:
        """Run a block as it is, but for the port."""
        command = ["sh", "-euc", code.replace("http://localhost:1416", self.url)]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "text": True}
        return subprocess.run(command, check=True, capture_output=True, **options).stdout

    @contextlib.contextmanager
    def serve(self, code: str, start: str = "hayhooks run") -> Iterator[None]:
        """Run a block that ends by starting a server, until this block is left."""
        command = ["sh", "-euc", code.replace(start, f"exec {start}")]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "stderr": subprocess.STDOUT}
        with (
            (self.home / "server.log").open("wb") as log,
            running(command, f"{self.url}/status", stdout=log, **options),
        ):
            yield


@pytest.fixture
def checkout(tmp_path: Path, upstream: Upstream) -> Checkout:
    checkout = Checkout(tmp_path, upstream)
    copy_wrapper(EXAMPLE, checkout.folder)
    for secret in (".git/config", ".venv/lib/secret.py", "tests/secret.py"):
        (checkout.folder / secret).parent.mkdir(parents=True)
        (checkout.folder / secret).write_text("SECRET = 1")
    example = (EXAMPLE / ".env.example").read_text()
    (checkout.folder / ".env.example").write_text(example.replace("OPENAI_API_KEY=", f"OPENAI_API_KEY={KEY}"))
    return checkout


def ask_all(checkout: Checkout, upstream: Upstream) -> None:
    """Ask as the README does with curl, where there is one, and compare a stream with the one that is printed."""
    upstream.reply = Reply(tokens=["Hello"])
    if shutil.which("curl"):
        stream, run = (checkout.run(code) for code in starting("curl"))
        [printed] = starting('data: {"id"')
        assert without_values(stream) == without_values(printed)
        assert run == '{"result":"Hello"}'


def without_values(stream: str) -> str:
    """Return a stream without what differs from answer to answer."""
    return re.sub(r'"created": \d+', "", re.sub(r"chatcmpl-\w+…?", "", stream)).strip()


def test_the_blocks_serve_the_example_and_ask_it(checkout: Checkout, upstream: Upstream) -> None:
    install = block("bash", name="by hand").splitlines(keepends=True)
    assert [line.split(maxsplit=2)[0] for line in install[:3]] == ["python3", ".", "pip"]
    with checkout.serve("".join(install[3:])):
        ask_all(checkout, upstream)
    assert {received.headers["authorization"] for received in upstream.received} == {f"Bearer {KEY}"}
    assert not (checkout.folder / "pipelines").exists()
    (checkout.folder / ".env").write_text("mine")
    [copy_example] = [line for line in install if ".env" in line]
    checkout.run(copy_example)
    assert (checkout.folder / ".env").read_text() == "mine"


def test_the_demo_is_cloned_printed_and_removed(tmp_path: Path, upstream: Upstream) -> None:
    checkout = Checkout(tmp_path, upstream)
    checkout.folder.mkdir()
    clone, change, start = block("bash", name="demo").splitlines()
    checkout.run(f"{clone.replace('REPOSITORY', shlex.quote(str(EXAMPLE)))}\n{change}\n{start.split()[0]} --help")
    cache = checkout.home / ".cache"
    (cache / NAME / "demo-1").mkdir(parents=True)
    [remove] = re.findall("`(rm -rf [^`]+)`", README)
    checkout.run(remove)
    assert list(cache.iterdir()) == []
    [printed] = starting("No OPENAI_API_KEY")
    assert printed.splitlines()[0] == f"No OPENAI_API_KEY, so {MODEL} answers, on this machine."
    assert printed.splitlines()[3] == f"> {QUESTIONS[0]}"


def test_the_deploy_block_uploads_the_example_alone(checkout: Checkout, upstream: Upstream) -> None:
    checkout.run("cp .env.example .env")
    with checkout.serve("hayhooks run"):
        checkout.run(block("bash", name="deploy"))
        checkout.run(block("bash", name="deploy"))  # a second time, as after a change
        ask_all(checkout, upstream)
        pipelines = checkout.home / "pipelines"
        arrived = {str(path.relative_to(pipelines)) for path in pipelines.rglob("*.*") if path.suffix != ".pyc"}
        [undeploy] = re.findall("`(hayhooks pipeline undeploy [^`]+)`", MANUAL)
        checkout.run(undeploy)
        assert not (pipelines / NAME).exists()
    production = {f"{NAME}/production/{path.name}" for path in (EXAMPLE / "production").iterdir() if path.is_file()}
    assert arrived == {f"{NAME}/pipeline_wrapper.py", *production}


@ONE_RUN_IS_ENOUGH
def test_the_container_serves_the_example(upstream: Upstream, tmp_path: Path) -> None:
    lines = [line.split(" ", 1) for line in block("dockerfile").splitlines()]
    instructions, image, app, port = dict(lines), tmp_path / "image", tmp_path / "app", free_port()
    pinned = dict(re.findall(r"([a-z-]+)==(\S+)", instructions["RUN"]))
    for requirement in map(Requirement, (EXAMPLE / "requirements.txt").read_text().splitlines()):
        assert pinned.pop(requirement.name) in requirement.specifier
    assert not pinned
    assert int(instructions["USER"])  # `runAsNonRoot` knows no names
    subprocess.run([sys.executable, "-m", "venv", image], check=True)
    if uv := shutil.which("uv", path=sysconfig.get_path("scripts")):  # installs the same in a tenth of the time
        (image / "bin" / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(uv)} pip "$@"\n')
    path = {"PATH": f"{image}/bin{os.pathsep}{os.environ['PATH']}"}
    install = {**os.environ, **path, "PIP_NO_COMPILE": "1", "VIRTUAL_ENV": str(image)}
    subprocess.run(["sh", "-euc", instructions["RUN"]], env=install, check=True)
    for instruction, rest in lines:
        if instruction == "COPY":  # of a folder, Docker copies what is in it
            source, target = rest.replace("/app", str(app)).split()
            copy_wrapper(EXAMPLE / source, Path(target))
    # The user has no home but the one that the Dockerfile sets, and even root cannot write below /dev/null.
    home = dict(one.split("=") for one in instructions.get("ENV", "").split())
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "HAYHOOKS_PORT": str(port)}
    environment = {"HOME": "/dev/null/home", **home, **path, **variables}
    command = [part.replace("/app", str(app)) for part in json.loads(instructions["CMD"])]
    url, command[0] = f"http://127.0.0.1:{port}", str(image / "bin" / command[0])
    with running(command, f"{url}/status/{NAME}", cwd=app, env=environment):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": HI}, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"


def test_the_pod_is_what_kubernetes_takes_and_gets_the_status_it_needs(chat: Chat) -> None:
    pod = yaml.safe_load(block("yaml", name="kubernetes"))
    labels: dict[str, Any] = {"labels": {"app": "chat"}}
    spec = {"selector": {"matchLabels": labels["labels"]}, "template": {"metadata": labels, "spec": pod}}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat"}, "spec": spec}
    validate_manifest(deployment, "1.30", strict=True)
    [container] = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    streams, upstream = int(variables["HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT"]), Settings.model_fields["OPENAI_TIMEOUT"]
    assert pod["terminationGracePeriodSeconds"] >= pause + streams + upstream.default
    assert f"TimeoutStopSec={pod['terminationGracePeriodSeconds']}" in block("ini", name="systemd")
    assert f"HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT={streams}" in block("ini", name="systemd")
    [files] = re.findall(r"LimitNOFILE=(\d+)", block("ini", name="systemd"))
    assert int(files) > 2 * Limits.model_fields["MAX_CONCURRENT_STREAMS"].default
    assert chat.http.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 200
    with hayhooks(wrapper=EXAMPLE) as without_key:  # so the deploy fails
        client = Chat(without_key).http
        assert client.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 404
        assert client.get(container["livenessProbe"]["httpGet"]["path"]).status_code == 200


def test_the_app_authenticates_adds_openais_form_and_hears_stop(checkout: Checkout, upstream: Upstream) -> None:
    (checkout.folder / "app.py").write_text(block("python", name="app"))
    copy_wrapper(EXAMPLE, checkout.folder / "pipelines" / NAME)
    checkout.environment.update(CLIENT_KEY="", OPENAI_API_KEY=KEY, HAYHOOKS_PIPELINES_DIR="pipelines")
    python = shlex.quote(sys.executable)
    with pytest.raises(RuntimeError, match="the process ended"), checkout.serve(f"{python} app.py", start=python):
        pass
    assert "CLIENT_KEY is not set." in (checkout.home / "server.log").read_text()
    checkout.environment.update(CLIENT_KEY="geheim")
    body = {"model": NAME, "messages": HI, "stream": True}
    with checkout.serve(f"{python} app.py", start=python):
        client = httpx.Client(base_url=checkout.url, timeout=60)
        assert client.post("/v1/chat/completions", json=body).json()["error"]["message"] == "Unauthorized"
        assert client.get("/hello").status_code == 401
        assert client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 200
        assert client.post("/deploy_files", json={}, headers={"Host": "x/status?"}).status_code == 401
        assert client.get(f"/status/{NAME}").status_code == 200
        assert not upstream.received
        client.headers["Authorization"] = "Bearer geheim"
        assert client.get("/v1/models").status_code == 200
        assert client.get("/hello").json() == {"hello": "world"}
        assert client.post("/deploy_files", json={}).status_code == 401
        assert client.post("/v1/chat/completions", json={**body, "n": 2}).json()["error"]["type"].startswith("invalid")
        assert client.get("/v1/chat/completions").json()["error"]["message"] == "Method Not Allowed"
        upstream.reply = Reply(status=404, error={"error": {"message": "No."}})
        failed = client.post("/v1/chat/completions", json=body)
        assert (failed.status_code, failed.headers["x-should-retry"]) == (400, "false")
        assert failed.json()["error"]["message"] == failed.json()["detail"] == "The upstream refused the request."
        upstream.forget()
        upstream.reply = LONG
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(texts_of(events_of(response.iter_raw()))) == "0 "
        assert_it_hears_stop(upstream)


def test_systemd_knows_what_the_unit_says(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        unavailable("there is no systemd-analyze here", comes_with_packages=False)
    (unit := tmp_path / "hayhooks.service").write_text(block("ini", name="systemd"))
    verify = ["systemd-analyze", "verify", str(unit)]
    said = subprocess.run(verify, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    assert "/opt/hayhooks/bin/hayhooks is not executable" in said
    assert not re.search("hayhooks.service:.*(Unknown|Failed|ignoring)", said)


def test_nginx_passes_what_clients_need_and_asks_the_next_worker(upstream: Upstream, tmp_path: Path) -> None:
    if not shutil.which("nginx"):
        unavailable("there is no nginx here", comes_with_packages=False)
    port, ours = free_port(), {"OPENAI_BASE_URL": upstream.url, "MAX_CONCURRENT_STREAMS": "1"}
    with deployed(**ours) as one, deployed(**ours) as two, contextlib.ExitStack() as streams:
        server = block("nginx").replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
        server = re.sub("ssl_certificate.*", "", server)
        for address, worker in (("10.0.0.1:1416", one), ("10.0.0.2:1416", two)):
            server = server.replace(address, f"127.0.0.1:{worker.port}")
        paths = "".join(f"{name}_temp_path {name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        configuration = f"daemon off; pid nginx.pid; events {{}} http {{ access_log off; {paths} {server} }}"
        (tmp_path / "nginx.conf").write_text(configuration)
        process = subprocess.Popen(["nginx", "-p", str(tmp_path), "-e", "stderr", "-c", "nginx.conf"])
        streams.callback(process.terminate)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wait_until(lambda: status_of(client) == 401, "nginx")
        assert client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 200
        for wrong in ("Bearer A-LONG-SECRETS", "Bearer x-A-LONG-SECRET", "A-LONG-SECRET"):
            assert client.get("/v1/models", headers={"Authorization": wrong}).status_code == 401
        client.headers["Authorization"] = "Bearer A-LONG-SECRET"
        assert client.get("/v1/models").status_code == 200
        assert client.get("/deploy_files").status_code == client.get("/docs").status_code == 404
        body = {"model": NAME, "messages": HI, "stream": True}
        upstream.reply = Reply(gated=True)
        with Chat(one).open():
            upstream.reply = Reply()
            for _ in range(2):  # one of them finds a full worker, and is passed on
                assert client.post("/v1/chat/completions", json=body).status_code == 200
        wait_until(lambda: Chat(one).post().is_success, "the slot")
        upstream.reply = Reply(gated=True)
        for _ in range(2):
            answer = streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            assert answer.status_code == 200
        for _ in range(3):  # and no 502, as full workers are not dead ones
            assert client.post("/v1/chat/completions", json=body).status_code == 503
        for _ in range(6):
            upstream.release()
        upstream.reply = Reply()
        one.process.kill()
        one.process.wait()
        for _ in range(5):  # a dead worker has the fewest connections
            assert client.get("/v1/models").status_code == 200


def status_of(client: httpx.Client) -> int:
    with contextlib.suppress(httpx.ConnectError):
        return client.get("/v1/models").status_code
    return 0


# The wrappers that are printed, and the tables


def test_the_wrappers_are_printed_whole() -> None:
    assert block("python", name="plain") == (EXAMPLE / "tests" / "harness" / "plain_wrapper.py").read_text()
    assert block("python", name="example") == (EXAMPLE / "pipeline_wrapper.py").read_text()


def test_without_the_argument_hayhooks_raises(upstream: Upstream, tmp_path: Path) -> None:
    argument = "            allow_sync_streaming_callbacks=True,\n"
    code, strict = block("python", name="plain"), tmp_path / "strict.py"
    assert argument in code
    strict.write_text(code.replace(argument, ""))
    [error] = re.findall("`ValueError: ([^`]+)`", README)
    with deployed(wrapper=strict, OPENAI_BASE_URL=upstream.url) as server:
        assert error.rstrip(".") in Chat(server).post().text


def rows_below(text: str, heading: str) -> list[list[str]]:
    """Return the cells of a table, which the beginning of its heading names."""
    table = text[text.index(heading) :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


class SdkError(Exception):
    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.body = status, {"Retry-After": "7"}, {"message": "You asked too much."}


FAILURES = rows_below(MANUAL, "| condition, or the upstream's status | status |")


def test_the_sentences_for_failures_are_those_of_the_code() -> None:
    assert [told.strip("`") for *_, told in FAILURES[4:]] == [TOO_LATE, FAILED, NO_SLOT]


@pytest.mark.parametrize("row", FAILURES[:4], ids=lambda row: row[0])
def test_a_failure_is_what_the_table_says(row: list[str]) -> None:
    cause, answered, told = row
    statuses = [int(status) for status in re.findall(r"\d{3}", cause)][: 1 if "other 4xx" in cause else None]
    for error in map(SdkError, statuses):
        failure = as_http_exception(error, [error])
        assert failure.status_code == int(answered[:3])
        assert failure.detail == ("You asked too much." if "own error" in told else told.strip("`"))
        for header in ("Retry-After", "x-should-retry"):
            assert (header in (failure.headers or {})) == (header in answered)


def test_a_failing_stream_ends_as_printed(chat: Chat, upstream: Upstream) -> None:
    [event] = re.findall(r"`(\{\"error\": .*?\}\})`", MANUAL)
    upstream.reply = Reply(then="break")
    with chat.http.stream("POST", "/v1/chat/completions", json=chat.request(stream=True)) as response:
        assert response.read().decode().endswith(f"data: {event}\n\ndata: [DONE]\n\n")


def test_the_variables_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (.+?) \|", MANUAL, re.MULTILINE)
    printed = {
        name: default.strip("`")
        for names, defaults in rows
        for name, default in zip(re.findall("[A-Z_]{2,}", names), defaults.split(", "), strict=True)
    }
    example = dict(re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE))
    fields = {**Settings.model_fields, **Limits.model_fields}
    assert set(example) - {"HAYHOOKS_PIPELINES_DIR"} == set(fields)
    for name, field in fields.items():
        assert printed.pop(name).startswith("required") if field.is_required() else printed[name] == example[name]
        assert field.is_required() or printed.pop(name) == str(field.default)
    hayhooks_settings = AppSettings(_env_file=None)
    assert printed == {
        "CLIENT_KEY": "required by `app.py",
        "HAYHOOKS_HOST": hayhooks_settings.host,
        "HAYHOOKS_PORT": str(hayhooks_settings.port),
        "HAYHOOKS_PIPELINES_DIR": f"./{Path(hayhooks_settings.pipelines_dir).relative_to(Path.cwd())}",
        "HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT": str(hayhooks_settings.graceful_shutdown_timeout),
    }


def test_the_forwarded_fields_are_those_of_the_code() -> None:
    [row] = [line for line in MANUAL.splitlines() if "| forwarded unless null" in line]
    assert tuple(re.findall("`(\\w+)`", row.split("|")[1])) == PARAMETERS


def test_the_commands_are_those_of_the_script() -> None:
    usage = subprocess.run([EXAMPLE / "tests" / "run", "--help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    named = re.findall(r"\./tests/run (\w+)", README + MANUAL + (EXAMPLE / "tests" / "README.md").read_text())
    assert set(named) == set(re.findall(r"\./tests/run (\w+)", usage))
    assert {"--once", "--chat"} == set(re.findall(r"`(--\w+)`", README)) < set(re.findall(r"\[(--\w+)\]", usage))


def test_the_costs_are_those_of_the_benchmark() -> None:
    report = (EXAMPLE / "tests" / "benchmark.md").read_text()
    assert report.split("## In short\n\n")[1].split("\n\n")[0] in README
    versions = re.findall(r"(?:[a-z-]+|Python) (\d+\.\d+\.\d+)", report.split("\n\n")[1])
    assert versions
    assert all(version in README for version in versions)
    ratios = re.findall(r"tokens per second of all streams, to .*?\| \d+ \| ([\d.]+) \|", report)
    printed = [f"{one}, {two} and {three}" for one, two, three in zip(*[iter(ratios)] * 3, strict=True)]
    assert printed
    assert all(figures in README for figures in printed)


def test_a_link_leads_to_a_file_and_a_heading() -> None:
    for folder, text in ((EXAMPLE, README), (EXAMPLE / "production", MANUAL)):
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            target = folder / path if path else folder / "README.md"
            assert target.exists(), path
            headings = re.findall("^#+ (.+)$", target.read_text() if anchor else "", re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, anchor


def test_a_recipe_has_at_most_thirty_lines() -> None:
    lengths = [len(one.code.splitlines()) for one in BLOCKS if one.name.startswith("recipe")]
    assert len(lengths) == 5
    assert max(lengths) <= 30
