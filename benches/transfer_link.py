#!/usr/bin/env python3
"""Time to the first token over a slow link: caches sent during the prefill, after it, and a local prefill.

    cargo build --release --locked
    benches/transfer_link.py [--tokens N] [--rates MBIT MBIT MBIT] [--chunk N] [--latency MS] [--repeats N] [--program PATH]

Two servers of the demo model on the CPU, in two network namespaces joined by a veth pair; `tc tbf` limits the rate of the prefill server's
output, and a relay here adds the latency to each direction of a transfer (many kernels lack netem). It requires `unshare -Urn`, or root.
For each rate a prompt of N tokens, a new one each time, is

    local       prefilled and answered by the decode server,
    after       prefilled by the prefill server, then fetched by the decode server,
    overlapped  sent to both at the same time.

All three are measured in each round. The predictions use only the round's local time, the bytes that the decode server counted, rate,
latency and the size of a prefill chunk. The table has medians of times and predictions, and the median over the rounds of
time / prediction. `after` adds the time of all bytes and a round trip to the local time. Overlapped, a chunk's latents can be sent when
the chunk is computed (in an equal share of the local time each) and the earlier ones have been sent, and the states when everything is
computed: the last of them arrives one latency later.
"""
import argparse
import asyncio
import http.client
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[1]
NEAR, FAR = "10.77.0.1", "10.77.0.2"
PREFILL, DECODE, TRANSFER, RELAY = 8101, 8102, 8103, 8104
HOWS = ("local", "after", "overlapped")
SECRET = "a secret for this run alone"


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rates", type=float, nargs=3, default=[5, 20, 200])
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--latency", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--program", default=str(ROOT / "target/release/kimi-linear"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Link:
    """The second namespace, which exists as long as a process in it, and the pair of interfaces."""

    def __init__(self):
        self.keeper = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.keeper.pid}/ns/net") == own:
            time.sleep(0.01)
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "klnear", "type", "veth", "peer", "name", "klfar")
        run("ip", "link", "set", "klfar", "netns", str(self.keeper.pid))
        run("ip", "addr", "add", f"{NEAR}/24", "dev", "klnear")
        run("ip", "link", "set", "klnear", "up")
        for command in (["link", "set", "lo", "up"], ["addr", "add", f"{FAR}/24", "dev", "klfar"], ["link", "set", "klfar", "up"]):
            run(*self.far("ip", *command))

    def far(self, *command):
        return ["nsenter", "-t", str(self.keeper.pid), "-n", *command]

    def shape(self, mbit):
        # A bucket of ten milliseconds, as tbf requires for its timer, and at least a few packets.
        burst = max(16_000, int(mbit * 1e6 / 8 / 100))
        run(*self.far("tc", "qdisc", "replace", "dev", "klfar", "root", "tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms"))


def run(*command):
    subprocess.run(command, check=True)


def relay(latency):
    """Passes connections on to the transfer port, each byte after `latency` seconds, in a thread of its own."""

    async def pass_on(reader, writer):
        queue = asyncio.Queue(maxsize=64)

        async def deliver():
            while (item := await queue.get()) is not None:
                due, data = item
                await asyncio.sleep(max(0, due - time.monotonic()))
                writer.write(data)
                await writer.drain()
            writer.close()

        delivery = asyncio.create_task(deliver())
        try:
            while data := await reader.read(65536):
                await queue.put((time.monotonic() + latency, data))
        except ConnectionError:
            pass
        await queue.put(None)
        await delivery

    async def take(reader, writer):
        far_reader, far_writer = await asyncio.open_connection(FAR, TRANSFER)
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer), return_exceptions=True)

    async def serve():
        server = await asyncio.start_server(take, NEAR, RELAY)
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()


def server(options, prefix, host, port, role):
    """A server that is ready."""
    environment = dict(os.environ, KIMI_LINEAR_KV_SECRET=SECRET)
    command = [*prefix, options.program, "serve", "--backend", "cpu", "--host", host, "--port", str(port)]
    command += ["--max-num-batched-tokens", str(options.chunk), "--kv-transfer-config", json.dumps(role)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(600):
        try:
            if request(host, port, "GET", "/health")[0] == 200:
                return process
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server on {host}:{port} does not answer")


def request(host, port, method, path, body=None):
    connection = http.client.HTTPConnection(host, port, timeout=120)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def first_token(body):
    """Requests a stream from the decode server and waits for its first token."""
    connection = http.client.HTTPConnection(NEAR, DECODE, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the decode server refused: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            break
    else:
        raise SystemExit("the stream ended without a token")
    end = time.monotonic()
    response.read()
    return end


def ask(body, how):
    """Seconds until the first token."""
    name = uuid.uuid4().hex
    sends = body | {"kv_transfer_params": {"do_remote_decode": True, "transfer_id": name}}
    where = {"do_remote_prefill": True, "remote_host": NEAR, "remote_port": RELAY, "transfer_id": name}
    fetches = body | {"kv_transfer_params": where}

    def prefill():
        return request(FAR, PREFILL, "POST", "/v1/completions", sends)

    start = time.monotonic()
    if how == "local":
        return first_token(body) - start
    if how == "after":
        status, answer = prefill()
        if status != 200:
            raise SystemExit(f"the prefill server refused: {answer}")
        return first_token(fetches) - start
    thread = threading.Thread(target=prefill)
    thread.start()
    end = first_token(fetches)
    thread.join()
    return end - start


def received():
    """Payload bytes that the decode server has received."""
    text = request(NEAR, DECODE, "GET", "/metrics")[1]
    lines = [line for line in text.splitlines() if line.startswith("kimi_linear:kv_transfer_bytes_total") and "received" in line and "consumer" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def prompt(tokens):
    """Random ids of that many tokens, so that no earlier prompt has the same prefix."""
    return [random.randrange(10, 200) for _ in range(tokens)]


def body(tokens):
    return {"prompt": prompt(tokens), "max_tokens": 2, "temperature": 0}


def count_bytes(tokens):
    """Bytes of the latents of this number of tokens, and of the states."""
    counts = []
    for length in (tokens // 2, tokens):
        before = received()
        ask(body(length), "after")
        counts.append(received() - before)
    a_token = (counts[1] - counts[0]) / (tokens - tokens // 2)
    return a_token * tokens, counts[1] - a_token * tokens


def overlapped_time(options, local, latents, states, each):
    """Seconds to the first token if only computing and sending take time; `each` is seconds per byte."""
    chunks, sent = -(-options.tokens // options.chunk), 0.0
    for chunk in range(chunks):
        done = min(1, (chunk + 1) * options.chunk / options.tokens)
        share = done - chunk * options.chunk / options.tokens
        sent = max(sent, local * done) + latents * share * each
    return sent + states * each + options.latency / 1000


def measure(options, link):
    tokens, way = options.tokens, options.latency / 1000
    for how in HOWS:
        ask(body(tokens), how)
    latents, states = count_bytes(tokens)
    print(f"{tokens} tokens: {latents:,.0f} bytes of latents, {states:,.0f} of states and hand-off; {options.latency} ms each way")
    print("| Mbit/s | local, s | after, s | predicted | time / prediction | overlapped, s | predicted | time / prediction |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rate in options.rates:
        link.shape(rate)
        rounds = [{how: ask(body(tokens), how) for how in HOWS} for _ in range(options.repeats)]
        each = 8 / (rate * 1e6)
        predictions = {
            "after": [one["local"] + (latents + states) * each + 2 * way for one in rounds],
            "overlapped": [overlapped_time(options, one["local"], latents, states, each) for one in rounds],
        }
        cells = [f"{rate:g}", f"{statistics.median(one['local'] for one in rounds):.3f}"]
        for how, predicted in predictions.items():
            times = [one[how] for one in rounds]
            ratio = statistics.median(time / prediction for time, prediction in zip(times, predicted))
            cells += [f"{statistics.median(times):.3f}", f"{statistics.median(predicted):.3f}", f"{ratio:.2f}"]
        print("|", " | ".join(cells), "|", flush=True)


def main():
    options = arguments()
    if not options.inside:
        inside = ["unshare", "-Urn", sys.executable, os.path.abspath(__file__), "--inside", *sys.argv[1:]]
        if subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode:
            print("skipped: the times over a link: network namespaces cannot be made here (`unshare -Urn true` fails)")
            return
        sys.exit(subprocess.run(inside).returncode)
    link = Link()
    relay(options.latency / 1000)
    producer = {"kv_role": "kv_producer", "kv_ip": FAR, "kv_port": TRANSFER}
    consumer = {"kv_role": "kv_consumer", "kv_load_failure_policy": "fail"}
    processes = [link.keeper]
    try:
        link.shape(1000)
        processes.append(server(options, link.far(), FAR, PREFILL, producer))
        processes.append(server(options, [], NEAR, DECODE, consumer))
        measure(options, link)
    finally:
        for process in reversed(processes):
            process.kill()


if __name__ == "__main__":
    main()
