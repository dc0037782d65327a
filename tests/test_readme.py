"""What README.md shows is what happens: its recipes, commands and servers run, its tables are the code's."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness.client import Chat, events_of, text_of, texts_of
from harness.elsewhere import ONE_RUN_IS_ENOUGH, served_from, write_pipelines
from harness.readme import block, blocks
from harness.serving import EXAMPLE, KEY, NAME, Server, copy_wrapper, deployed, free_port, hayhooks, running, wait_until
from harness.upstream import Reply, Upstream
from hayhooks.settings import AppSettings
from kubernetes_validate.utils import validate as validate_manifest
from packaging.requirements import Requirement
from packaging.version import Version

README = (EXAMPLE / "README.md").read_text()
HI = [{"role": "user", "content": "Hi"}]
LONG = Reply([f"{number} " for number in range(10_000)], pace=0.02)
HAYSTACK = Version(importlib.metadata.version("haystack-ai"))
NEEDS_2_31 = pytest.mark.skipif(Version("2.31") > HAYSTACK, reason="older Haystacks have no output_passthrough")


# The recipes


class Named(Chat):
    """A client of one of a server's pipelines."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(server)
        self.name = name

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        return super().request(messages, **{"model": self.name, **body})


def recipe(name: str) -> dict[str, str]:
    """Return the files of a recipe by their names."""
    return {"pipeline_wrapper.py": block("python", name=f"recipe {name}")}


def azure(url: str) -> dict[str, str]:
    """Return the example with the README's line for Azure, and this URL."""
    [old] = re.findall(
        r"^ +llm = OpenAIGenerator.*$", code := (EXAMPLE / "pipeline_wrapper.py").read_text(), re.MULTILINE
    )
    new = block("python", name="azure").rstrip().replace("https://YOUR-RESOURCE.openai.azure.com", url)
    code = code.replace(old, new).replace("import OpenAIGenerator", "import AzureOpenAIGenerator")
    return {"pipeline_wrapper.py": code}


@pytest.fixture(scope="module")
def recipes(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    definition = block("yaml", name="pipeline").replace("https://api.openai.com/v1", shared_upstream.url)
    folder = tmp_path_factory.mktemp("pipelines")
    pipelines = {
        "rag": recipe("rag"),
        "from_yaml": {**recipe("from_yaml"), "pipeline.yml": definition},
        "azure": azure(shared_upstream.url.removesuffix("/v1")),
        "any_component": recipe("any_component"),
        "async_way": recipe("async_way"),
    }
    write_pipelines(folder, pipelines)
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": shared_upstream.url, "HAYHOOKS_PIPELINES_DIR": str(folder)}
    with hayhooks(AZURE_OPENAI_API_KEY=KEY, HAYHOOKS_STARTUP_DEPLOY_STRATEGY="sequential", **variables) as server:
        yield server


def assert_it_serves(chat: Chat, upstream: Upstream) -> None:
    """Check that a pipeline streams, stops with its client, and tells it of a wrong key."""
    assert text_of(chat.events()) == "Hello, world!"
    upstream.forget()
    upstream.reply = LONG
    with chat.open() as events:
        next(texts_of(events))
    upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left
    upstream.reply = Reply(status=401, error={"error": {"message": "No."}})
    assert chat.post(stream=True).status_code == 424
    upstream.forget()


def test_rag_with_defaults(recipes: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(recipes, "rag"), upstream)
    assert chat.post("When is lunch?").status_code == 200
    history = [
        {"role": "user", "content": "When does the office open?"},
        {"role": "assistant", "content": "The office opens at nine."},
    ]
    question = {"role": "user", "content": [{"type": "text", "text": "When is lunch?"}]}
    chat.post([{"role": "system", "content": "Rhyme."}, *history, question], temperature=0.5)
    default, sent = (one.body for one in upstream.received)
    assert [message["content"] for message in default["messages"]] == [
        "You are a librarian.",
        "Lunch is at noon.\n\nWhen is lunch?",
    ]
    assert (default["temperature"], default["verbosity"]) == (1, "low")
    assert sent["messages"][0]["content"] == "Rhyme."
    assert sent["messages"][1]["content"].startswith("Lunch is at noon.")
    assert (sent["temperature"], sent["verbosity"]) == (0.5, "low")


@NEEDS_2_31
def test_a_router_from_yaml(recipes: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(recipes, "from_yaml"), upstream)
    for question in ("42", "[1, 2]", "None", "{{ 7*7 }}", "long " * 50):
        assert text_of(chat.events(question)) == "Hello, world!"
        assert upstream.received[-1].body["messages"] == [{"role": "user", "content": question}]
    assert [one.body["model"] for one in upstream.received] == [*["gpt-5-nano"] * 4, "gpt-5-mini"]


def test_azure(recipes: Server, upstream: Upstream) -> None:
    assert_it_serves(chat := Named(recipes, "azure"), upstream)
    assert chat.post(temperature=0.5).status_code == 200
    [received] = upstream.received
    assert received.path == "/openai/deployments/YOUR-DEPLOYMENT/chat/completions"
    assert (received.headers["api-key"], received.body["temperature"]) == (KEY, 0.5)
    upstream.reply = Reply(status=400, error={"error": {"message": f"{KEY} asks too much."}})
    assert chat.post().json() == {"detail": "[key] asks too much."}


def assert_the_async_way_serves(chat: Chat, upstream: Upstream) -> None:
    assert_it_serves(chat, upstream)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [*PARTS, image]}]
    events = chat.events(conversation, temperature=0.5, stream_options={"include_usage": True})
    assert "usage" in events[-1]
    received = upstream.received[0].body
    assert received["temperature"] == 0.5
    assert [message["role"] for message in received["messages"]] == ["system", "user"]


PARTS = [{"type": "text", "text": "What is it?"}]


@NEEDS_2_31  # older ones take no images
def test_the_async_way_on_haystack_2(recipes: Server, upstream: Upstream) -> None:
    assert_the_async_way_serves(Named(recipes, "async_way"), upstream)


@ONE_RUN_IS_ENOUGH
def test_the_recipes_for_both_on_haystack_3(upstream: Upstream) -> None:
    pipelines = {"async_way": recipe("async_way"), "any_component": recipe("any_component")}
    with served_from("haystack_3", pipelines, OPENAI_API_KEY=KEY, OPENAI_BASE_URL=upstream.url) as server:
        assert_the_async_way_serves(Named(server, "async_way"), upstream)
        assert_any_component_serves(server)


def test_any_component(recipes: Server) -> None:
    assert_any_component_serves(recipes)


def assert_any_component_serves(server: Server) -> None:
    chat = Named(server, "any_component")
    assert list(texts_of(chat.events("one two"))) == ["one ", "two "]
    assert chat.post("one two").json()["choices"][0]["finish_reason"] == "stop"


def test_a_recipe_has_at_most_thirty_lines() -> None:
    recipes = [one.code for one in blocks() if one.name.startswith("recipe")]
    assert len(recipes) == 4
    assert max(len(code.splitlines()) for code in recipes) <= 30


# The commands


@dataclass
class Checkout:
    """A user's checkout, with all that must not be uploaded, and an empty home."""

    folder: Path
    environment: dict[str, str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def here(self, code: str) -> str:
        return code.replace("http://localhost:1416", self.url).replace("/tmp/clean", f"{self.folder.parent}/clean")

    def run(self, code: str) -> str:
        """Run a block as it is, but for the port and for /tmp."""
        command = ["sh", "-euc", self.here(code)]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "text": True}
        return subprocess.run(command, check=True, capture_output=True, **options).stdout

    @contextlib.contextmanager
    def serve(self, code: str, start: str = "hayhooks run") -> Iterator[None]:
        """Run a block that ends by starting a server, until this block is left."""
        command = ["sh", "-euc", code.replace(start, f"exec {start}")]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "stderr": subprocess.STDOUT}
        with (
            (self.folder.parent / "server.log").open("wb") as log,
            running(command, f"{self.url}/status", stdout=log, **options),
        ):
            yield


@pytest.fixture
def checkout(tmp_path: Path, upstream: Upstream) -> Checkout:
    folder, home, port = tmp_path / "checkout", tmp_path / "home", free_port()
    copy_wrapper(EXAMPLE, folder)
    for secret in (".git/config", ".venv/lib/secret.py", "tests/secret.py"):
        (folder / secret).parent.mkdir(parents=True)
        (folder / secret).write_text("SECRET = 1")
    example = (EXAMPLE / ".env.example").read_text()
    (folder / ".env.example").write_text(example.replace("OPENAI_API_KEY=", f"OPENAI_API_KEY={KEY}"))
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


def ask_all(checkout: Checkout, upstream: Upstream) -> None:
    """Ask as the README does with curl, where there is one, and compare a stream with the one that is printed."""
    upstream.reply = Reply(tokens=["Hello"])
    curl = [one.code for one in blocks() if one.code.startswith("curl")]
    assert len(curl) == 2
    if shutil.which("curl"):
        stream, run = (checkout.run(code) for code in curl)
        [printed] = [one.code for one in blocks() if one.code.startswith('data: {"id"')]
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


def test_the_demo_can_be_removed(checkout: Checkout) -> None:
    cache = Path(checkout.environment["HOME"]) / ".cache"
    (cache / NAME / "demo-1").mkdir(parents=True)
    [remove] = re.findall("`(rm -rf [^`]+)`", README)
    checkout.run(remove)
    assert list(cache.iterdir()) == []


def test_the_deploy_block_uploads_the_example_alone(checkout: Checkout, upstream: Upstream) -> None:
    checkout.run("cp .env.example .env")
    with checkout.serve("hayhooks run"):
        checkout.run(block("bash", name="deploy"))
        checkout.run(block("bash", name="deploy"))  # a second time, as after a change
        ask_all(checkout, upstream)
    pipelines = Path(checkout.environment["HOME"]) / "pipelines"
    arrived = {str(path.relative_to(pipelines)) for path in pipelines.rglob("*.*") if path.suffix != ".pyc"}
    production = {f"{NAME}/production/{path.name}" for path in (EXAMPLE / "production").glob("*.py")}
    assert arrived == {f"{NAME}/pipeline_wrapper.py", *production}


def dockerfile() -> dict[str, str]:
    """Return the Dockerfile's instructions, of which each comes once but COPY, whose last one counts."""
    return dict(line.split(" ", 1) for line in block("dockerfile").splitlines())


@ONE_RUN_IS_ENOUGH
def test_the_container_serves_the_example(upstream: Upstream, tmp_path: Path) -> None:
    image, app = tmp_path / "image", tmp_path / "app"
    subprocess.run([sys.executable, "-m", "venv", image], check=True)
    environment = {"PATH": f"{image}/bin{os.pathsep}{os.environ['PATH']}", "HOME": "/nonexistent"}
    install = {**os.environ, **environment, "PIP_NO_COMPILE": "1", "VIRTUAL_ENV": str(image)}
    if uv := shutil.which("uv", path=sysconfig.get_path("scripts")):  # installs the same in a tenth of the time
        (image / "bin" / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(uv)} pip "$@"\n')
    subprocess.run(["sh", "-euc", dockerfile()["RUN"]], env=install, check=True)
    for line in block("dockerfile").splitlines():
        if line.startswith("COPY"):  # of a folder, Docker copies what is in it
            source, folder = line.removeprefix("COPY ").replace("/app", str(app)).split()
            Path(folder).mkdir(parents=True, exist_ok=True)
            if (EXAMPLE / source).is_dir():
                copy_wrapper(EXAMPLE / source, Path(folder))
            else:
                shutil.copy(EXAMPLE / source, folder)
    port = free_port()
    command = [part.replace("/app", str(app)) for part in json.loads(dockerfile()["CMD"])]
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "HAYHOOKS_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    command[0] = str(image / "bin" / command[0])
    with running(command, f"{url}/status/{NAME}", cwd=app, env={**environment, **variables}):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": HI}, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"


def test_the_versions_of_the_container_are_in_the_ranges() -> None:
    pinned = dict(re.findall(r"([a-z-]+)==(\S+)", dockerfile()["RUN"]))
    for line in (EXAMPLE / "requirements.txt").read_text().splitlines():
        requirement = Requirement(line)
        assert pinned.pop(requirement.name) in requirement.specifier
    assert not pinned


def test_the_pod_is_what_kubernetes_takes_and_gets_the_status_it_needs(chat: Chat) -> None:
    pod = yaml.safe_load(block("yaml", name="kubernetes"))
    labels: dict[str, Any] = {"labels": {"app": "chat"}}
    template = {"metadata": labels, "spec": pod}
    spec = {"selector": {"matchLabels": labels["labels"]}, "template": template}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat"}, "spec": spec}
    validate_manifest(deployment, "1.30", strict=True)
    [container] = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + int(variables["HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT"])
    assert chat.http.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 200
    with hayhooks(wrapper=EXAMPLE) as without_key:  # so the deploy fails
        client = Chat(without_key).http
        assert client.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 404
        assert client.get(container["livenessProbe"]["httpGet"]["path"]).status_code == 200


def test_the_app_authenticates_adds_openais_form_and_hears_stop(checkout: Checkout, upstream: Upstream) -> None:
    (checkout.folder / "app.py").write_text(block("python", name="app"))
    copy_wrapper(EXAMPLE, checkout.folder / "pipelines" / NAME)
    checkout.environment.update(CLIENT_KEY="geheim", OPENAI_API_KEY=KEY, HAYHOOKS_PIPELINES_DIR="pipelines")
    body = {"model": NAME, "messages": HI, "stream": True}
    with checkout.serve(f"{shlex.quote(sys.executable)} app.py", start=shlex.quote(sys.executable)):
        client = httpx.Client(base_url=checkout.url, timeout=60)
        assert client.post("/v1/chat/completions", json=body).json()["error"]["message"] == "Unauthorized"
        assert client.get(f"/status/{NAME}").status_code == 200
        assert not upstream.received
        client.headers["Authorization"] = "Bearer geheim"
        assert client.get("/v1/models").status_code == 200
        assert client.post("/deploy_files", json={}).status_code == 401
        assert client.post("/v1/chat/completions", json={**body, "n": 2}).json()["error"]["type"].startswith("invalid")
        upstream.reply = Reply(status=404, error={"error": {"message": "No."}})
        failed = client.post("/v1/chat/completions", json=body)
        assert (failed.status_code, failed.headers["x-should-retry"]) == (424, "false")
        assert failed.json()["error"]["message"] == failed.json()["detail"] == "The upstream refused the request."
        upstream.reply = LONG
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(texts_of(events_of(response.iter_raw())))
        upstream.wait_until(lambda: upstream.received[1].over)
        assert upstream.received[1].left


@pytest.mark.skipif(not shutil.which("nginx"), reason="there is no nginx here")
def test_nginx_passes_what_clients_need_and_asks_the_next_worker(upstream: Upstream, tmp_path: Path) -> None:
    port, ours = free_port(), {"OPENAI_BASE_URL": upstream.url, "MAX_CONCURRENT_STREAMS": "1"}
    with deployed(**ours) as one, deployed(**ours) as two, contextlib.ExitStack() as streams:
        server = block("nginx").replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
        server = re.sub("ssl_certificate.*", "", server)
        for address, worker in (("10.0.0.1:1416", one), ("10.0.0.2:1416", two)):
            server = server.replace(address, f"127.0.0.1:{worker.port}")
        logs = "error_log stderr; access_log off; client_body_temp_path body; proxy_temp_path proxy;"
        others = "fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;"
        configuration = f"daemon off; pid nginx.pid; events {{}} http {{ {logs} {others} {server} }}"
        (tmp_path / "nginx.conf").write_text(configuration.replace("error_log stderr; access_log", "access_log"))
        command = ["nginx", "-p", str(tmp_path), "-e", "stderr", "-c", "nginx.conf"]
        process = subprocess.Popen(command)
        streams.callback(process.terminate)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wait_until(lambda: status_of(client) == 401, "nginx")
        assert client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 200
        client.headers["Authorization"] = "Bearer A-LONG-SECRET"
        assert client.get("/v1/models").status_code == 200
        assert client.get("/deploy_files").status_code == client.get("/docs").status_code == 404
        upstream.reply = Reply(gated=True)
        body = {"model": NAME, "messages": HI, "stream": True}
        for _ in range(2):  # the second finds the first worker full, whichever it is
            answer = streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            assert answer.status_code == 200
        refused = [client.post("/v1/chat/completions", json=body) for _ in range(5)]
        assert {answer.json()["detail"] for answer in refused} == {"All streams are in use: try again."}
        for _ in range(6):
            upstream.release()
        upstream.reply = Reply()
        one.process.kill()
        one.process.wait()
        for _ in range(5):  # a dead worker has the fewest connections
            assert client.get("/v1/models").status_code == 200


PREFLIGHT = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}


def status_of(client: httpx.Client) -> int:
    with contextlib.suppress(httpx.ConnectError):
        return client.get("/v1/models").status_code
    return 0


def test_the_commands_of_the_script_are_in_the_readmes() -> None:
    usage = subprocess.run([EXAMPLE / "tests" / "run", "--help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    named = re.findall(r"\./tests/run (\w+)", README + (EXAMPLE / "tests" / "README.md").read_text())
    assert set(named) == set(re.findall(r"\./tests/run (\w+)", usage))


# The plain version, and the tables


def test_the_plain_version_is_printed_whole() -> None:
    assert block("python", name="plain") == (EXAMPLE / "tests" / "harness" / "plain_wrapper.py").read_text()


def test_without_the_argument_hayhooks_raises(upstream: Upstream, tmp_path: Path) -> None:
    argument = "            allow_sync_streaming_callbacks=True,\n"
    code, strict = block("python", name="plain"), tmp_path / "strict.py"
    assert argument in code
    strict.write_text(code.replace(argument, ""))
    [error] = re.findall("`ValueError: ([^`]+)`", README)
    with deployed(wrapper=strict, OPENAI_BASE_URL=upstream.url) as server:
        assert error.rstrip(".") in Chat(server).post().text


def rows_below(heading: str) -> list[list[str]]:
    """Return the cells of a table, which the beginning of its heading names."""
    table = README[README.index(heading) :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


FAILURES = rows_below("| the upstream | status |")


@pytest.mark.parametrize("row", FAILURES, ids=[cause for cause, *_ in FAILURES])
def test_a_failure_is_what_the_table_says(small: Chat, upstream: Upstream, row: list[str]) -> None:
    cause, answered, told = row
    sentence = "You asked too much."
    detail = sentence if told == "the upstream's own sentence" else told.strip("`")
    statuses = [int(status) for status in re.findall(r"\d{3}", cause)][: 1 if "other 4xx" in cause else None]
    with contextlib.ExitStack() as stack:
        if "OPENAI_TIMEOUT" in cause:
            upstream.reply = Reply(tokens=[], role=False, then="stall")
        elif "MAX_CONCURRENT_STREAMS" in cause:
            upstream.reply = LONG
            streams = [stack.enter_context(small.open()) for _ in range(8)]
            assert all(map(next, streams))
        else:
            assert statuses or cause == "anything else"
            statuses = statuses or [500]
        for status in statuses or [200]:
            if status != 200:
                headers = {"Retry-After": "7"}
                upstream.reply = Reply(status=status, error={"error": {"message": sentence}}, headers=headers)
            for stream in (True, False):
                failed = small.post(stream=stream)
                assert failed.json() == {"detail": detail}
                assert failed.status_code == (status if answered.startswith("the same") else int(answered[:3]))
                waits = failed.headers.get("Retry-After")
                assert waits == ("1" if "Retry-After: 1" in answered else "7" if "Retry-After" in answered else None)
                assert failed.headers.get("x-should-retry") == ("false" if "x-should-retry" in answered else None)


def test_a_failing_stream_ends_as_printed(chat: Chat, upstream: Upstream) -> None:
    [failure] = [one.code for one in blocks() if one.code.startswith('data: {"error"')]
    upstream.reply = Reply(then="break")
    with chat.http.stream("POST", "/v1/chat/completions", json=chat.request(stream=True)) as response:
        assert response.read().decode().strip().endswith(failure.strip())


VARIABLES = {
    name: default
    for names, defaults in re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (.+?) \|", README, re.MULTILINE)
    for name, default in zip(re.findall("[A-Z_]{2,}", names), defaults.split(", "), strict=True)
}


def test_the_variables_are_those_of_the_code(wrapper_module: Any) -> None:
    fields = wrapper_module.Settings.model_fields
    example = dict(re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE))
    ours = {name: default for name, default in VARIABLES.items() if not name.startswith("HAYHOOKS")}
    assert set(ours) == set(fields) == set(example) - {"HAYHOOKS_PIPELINES_DIR"}
    assert ours.pop("OPENAI_API_KEY") == "required by `Settings`"
    assert example["OPENAI_API_KEY"] == ""
    for name, default in ours.items():
        assert default.strip("`") == example[name] == str(fields[name].default)


def test_hayhooks_variables_have_the_defaults_that_are_printed() -> None:
    settings = AppSettings(_env_file=None)
    printed = {name: default.strip("`") for name, default in VARIABLES.items() if name.startswith("HAYHOOKS")}
    assert printed == {
        "HAYHOOKS_HOST": settings.host,
        "HAYHOOKS_PORT": str(settings.port),
        "HAYHOOKS_PIPELINES_DIR": f"./{Path(settings.pipelines_dir).relative_to(Path.cwd())}",
        "HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT": str(settings.graceful_shutdown_timeout),
    }


def test_the_forwarded_fields_are_those_of_the_code(wrapper_module: Any) -> None:
    [row] = [line for line in README.splitlines() if "| forwarded unless null" in line]
    request = sys.modules[wrapper_module.parse_parameters.__module__]
    assert tuple(re.findall("`(\\w+)`", row.split("|")[1])) == request.PARAMETERS


def measured(heading: str, streams: str, unit: Callable[[str], str]) -> list[str]:
    """Return a row of the benchmark's report, without its first variant: the oldest Python's (and the newest's)."""
    sections = (EXAMPLE / "tests" / "benchmark.md").read_text().split("\n## Python ")[1:]
    oldest, newest = (
        re.findall(rf"^\| {streams} \| (.+) \|$", section.split(f"### {heading}\n")[1], re.MULTILINE)[0].split(" | ")
        for section in sections
    )
    cells = []
    for old, new in itertools.zip_longest(oldest[1:], newest[1:], fillvalue="-"):
        shown = [unit(cell.split(" / ")[-1].replace(",", "")) for cell in (old, new) if "-" not in cell]
        cells.append(f"{shown[0]} ({shown[1]})" if len(shown) == 2 else "".join(shown) or "-")
    return cells


def seconds(milliseconds: str) -> str:
    return f"{int(milliseconds) / 1000:.1f} s"


@pytest.mark.parametrize("row", COSTS := rows_below("| Python 3.10 (3.13) |"), ids=[name for name, *_ in COSTS])
def test_the_costs_are_those_of_the_benchmark(row: list[str]) -> None:
    [streams] = re.findall(r"(\d+) streams", row[0])
    heading, unit = {
        "tok": ("Tokens per second of each stream", lambda cell: f"{float(cell):.0f}"),
        "who": ("Whole answer, p50 / p95 in s", lambda cell: f"{cell} s"),
        "fir": ("First token, p50 / p95 in ms", seconds),
        "CPU": ("CPU time per chunk in µs", lambda cell: f"{cell} µs"),
    }[row[0][:3]]
    assert row[1:] == measured(heading, streams, unit)


def test_the_versions_of_the_costs_are_those_of_the_benchmark() -> None:
    report = (EXAMPLE / "tests" / "benchmark.md").read_text().split("\n\n")[1]
    versions = re.findall(r"(?:[a-z-]+|Python) (\d+\.\d+\.\d+)", report)
    assert versions
    assert all(version in README for version in versions)


def test_the_last_line_is_the_licence() -> None:
    assert README.endswith("\nApache-2.0, as Hayhooks.\n")
