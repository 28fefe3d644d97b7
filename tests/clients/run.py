#!/usr/bin/env python3
"""Runs the scripts of this folder against the program, and prints a table. Fails if one of them fails.

    run.py PROGRAM [NAME...]

PROGRAM is `kimi-linear`; it serves the demo model on a free port. Each script runs with the Python of the environment that has its
client's package (`make clients` makes them). Telemetry is turned off by the variables of each client, and what goes to another host
goes to a proxy that does not exist.
"""

import os
import pathlib
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
KEY = "a key"
# The environment of each client, and the package whose version the table shows.
CLIENTS = {
    "litellm": ("openai", "litellm"),
    "langchain": ("openai", "langchain-openai"),
    "pydantic_ai": ("openai", "pydantic-ai-slim"),
    "instructor": ("openai", "instructor"),
    "llm": ("openai", "llm"),
    "lm_eval": ("openai", "lm_eval"),
    "guidellm": ("guidellm", "guidellm"),
}
QUIET = {
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LOGFIRE_SEND_TO_LOGFIRE": "false",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "https_proxy": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1",
    "OTEL_SDK_DISABLED": "true",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def serve(program):
    """The server's process and its address, once it is ready."""
    flags = ["serve", "--backend", "cpu", "--port", "0", "--api-key", KEY, "--served-model-name", "model"]
    server = subprocess.Popen(
        [program, *flags, "--model", ROOT / "assets/demo"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    address = server.stdout.readline().strip().removeprefix("listening on ")
    curl = "import sys, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(sys.argv[1] + '/health')"
    for _ in range(600):
        if subprocess.run([sys.executable, "-c", curl, address], capture_output=True).returncode == 0:
            return server, address
        time.sleep(0.1)
    server.kill()
    raise SystemExit("error: the server does not become ready")


def run(name, address):
    """Whether the client's script ended well, what it wrote, the version of its package, and its seconds."""
    environment, package = CLIENTS[name]
    python = ROOT / "target/clients" / environment / "bin/python"
    version = subprocess.run(
        [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], capture_output=True, text=True, check=True
    )
    variables = os.environ | QUIET | {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": KEY}
    begun = time.monotonic()
    ran = subprocess.run([python, FOLDER / f"{name}_client.py"], env=variables, capture_output=True, text=True)
    return ran.returncode == 0, ran.stdout + ran.stderr, f"{package} {version.stdout.strip()}", time.monotonic() - begun


def main(program, *names):
    server, address = serve(program)
    rows, failed = [], 0
    try:
        for name in names or CLIENTS:
            well, text, package, seconds = run(name, address)
            if not well:
                failed += 1
                print(f"--- {name}\n{text}", file=sys.stderr)
            rows.append(f"| {name} | {package} | {'passed' if well else 'FAILED'} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    finally:
        server.terminate()
        server.wait()
    print("\n| client | package | result | seconds |\n|---|---|---|---:|", *rows, sep="\n")
    print(f"\n{len(rows) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
