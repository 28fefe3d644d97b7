"""Prefills prompts on one server and decodes on another, behind one address for OpenAI's clients.

    kimi-linear serve --model MODEL --port 8100 --kv-transfer listen:127.0.0.1:14579
    kimi-linear serve --model MODEL --port 8200 --kv-transfer connect:127.0.0.1:14579
    python3 examples/disaggregated_proxy.py --port 8000 --prefill 127.0.0.1:8100 --decode 127.0.0.1:8200

Both servers get the request at once, under one `transfer_id`: the decode server fetches caches while the prefill server still computes
them. With --sequential the decode server gets the request after the prefill server has answered, as in vLLM's proxies; that answer contains
the address of the caches. It needs only Python's standard library.
"""
import argparse
import http.client
import json
import socket
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GENERATES = ("/v1/completions", "/v1/chat/completions")


def send(address, method, path, body, headers):
    """Sends a request and returns its connection, without waiting for the answer."""
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request(method, path, body, headers)
    return connection


class Prefill(threading.Thread):
    """The request to the prefill server, whose answer has the first token and the address of the caches."""

    def __init__(self, address, path, body, headers):
        super().__init__(daemon=True)
        self.request = (address, "POST", path, json.dumps(body).encode(), headers)
        self.status, self.answer = None, b""
        # The decode server's connection, closed if the prefill server refuses: otherwise it would wait for caches.
        self.waits = None

    def run(self):
        try:
            response = send(*self.request).getresponse()
            self.status, self.answer = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            sentence = f"the prefill server at {self.request[0]} cannot be reached: {error}"
            self.status = 502
            self.answer = json.dumps({"error": {"message": sentence, "type": "proxy_error", "param": None, "code": None}}).encode()
            return  # The decode server notices this too, and follows its kv_load_failure_policy.
        if self.status != 200 and self.waits is not None:
            try:
                self.waits.sock.shutdown(socket.SHUT_RDWR)
            except (AttributeError, OSError):
                pass  # It has already ended.


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    servers = None

    def log_message(self, *_):
        pass

    def passed_on(self):
        """The client's headers that the servers need."""
        names = ("authorization", "content-type", "x-request-id")
        return {name: self.headers[name] for name in names if name in self.headers}

    def relay(self, connection):
        """Sends a server's answer to the client as a stream."""
        response = connection.getresponse()
        self.send_response(response.status)
        self.send_header("content-type", response.getheader("content-type", "application/json"))
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while piece := response.read1(65536):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        connection.close()

    def refuse(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.relay(send(self.servers.decode, "GET", self.path, None, self.passed_on()))

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = self.passed_on()
        try:
            body = json.loads(data)
        except ValueError:
            body = None
        if self.path not in GENERATES or not isinstance(body, dict):
            self.relay(send(self.servers.decode, "POST", self.path, data, headers))
            return
        transfer = f"proxy-{uuid.uuid4()}"
        there = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
        first = {**body, "stream": False, "kv_transfer_params": there}
        first.pop("stream_options", None)
        prefill = Prefill(self.servers.prefill, self.path, first, headers)
        here = {"do_remote_decode": False, "do_remote_prefill": True, "transfer_id": transfer}
        if self.servers.sequential:
            prefill.start()
            prefill.join()
            if prefill.status != 200:
                self.refuse(prefill.status, prefill.answer)
                return
            here = json.loads(prefill.answer)["kv_transfer_params"]
        second = json.dumps({**body, "kv_transfer_params": here}).encode()
        decode = send(self.servers.decode, "POST", self.path, second, headers)
        if not self.servers.sequential:
            prefill.waits = decode
            prefill.start()
        try:
            self.relay(decode)
        except (OSError, http.client.HTTPException):
            # If the prefill server failed, its answer has the reason.
            if prefill.status in (None, 200):
                raise
            self.refuse(prefill.status, prefill.answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", required=True, metavar="HOST:PORT")
    parser.add_argument("--decode", required=True, metavar="HOST:PORT")
    parser.add_argument("--sequential", action="store_true", help="send the request to the decode server after the prefill server has answered")
    Proxy.servers = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", Proxy.servers.port), Proxy)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
