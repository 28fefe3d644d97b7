//! The server that is attacked, in a process of its own, and what it holds.

use std::fs::File;
use std::io::{Read, Seek};
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;

use crate::harness::metric;
use crate::program::{Process, serve};

/// The key that requests need.
const KEY: &str = "a key";

/// Seconds that a client may be silent.
pub const CLIENT_TIMEOUT: u64 = 2;

/// How often it is looked whether everything has been given back, four times a second. The bound is only there to fail.
const LOOKS: usize = 4 * 120;

/// How much more memory than at the beginning it may hold at the end, however long it took: pools and swap space that were
/// touched, stored responses, and what is between live blocks of the allocator.
const KEPT_KIB: u64 = 64 << 10;

/// What a process holds besides its pools, which must be empty.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub resident_kib: u64,
    pub descriptors: usize,
    pub threads: usize,
}

/// The server, its log, and clients for it.
pub struct Target {
    process: Mutex<Process>,
    log: Mutex<File>,
    id: u32,
    pub url: String,
    pub address: SocketAddr,
}

impl Target {
    pub fn start() -> Self {
        let timeout = CLIENT_TIMEOUT.to_string();
        let mut command = serve(&[
            "--api-key",
            KEY,
            "--client-timeout",
            &timeout,
            "--max-model-len",
            "2048",
            "--max-num-seqs",
            "16",
            "--max-queue",
            "4096",
            "--num-gpu-blocks-override",
            "160",
            "--swap-space",
            "0.01",
        ]);
        let log = tempfile::tempfile().unwrap();
        command
            .stdout(Stdio::piped())
            .stderr(log.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let id = child.id();
        let process = Process::of(child);
        let url = process.url.clone();
        let address = url.trim_start_matches("http://").parse().unwrap();
        Self {
            process: Mutex::new(process),
            log: Mutex::new(log),
            id,
            url,
            address,
        }
    }

    /// A client that keeps no connection for as long as the server does.
    pub fn client() -> Client {
        let client = Client::builder().no_proxy();
        let idle = Duration::from_secs(CLIENT_TIMEOUT) / 2;
        client.pool_idle_timeout(idle).build().unwrap()
    }

    /// A request with the key.
    pub fn request(&self, client: &Client, method: Method, path: &str) -> RequestBuilder {
        let request = client.request(method, format!("{}{path}", self.url));
        request.bearer_auth(KEY)
    }

    /// A request with the key and a body.
    pub fn post(&self, client: &Client, path: &str, body: &Value) -> RequestBuilder {
        self.request(client, Method::POST, path).json(body)
    }

    /// A request's head with the key, which ends with these headers and an empty line.
    pub fn head(path: &str, more: &str) -> String {
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n{more}\r\n"
        )
    }

    /// A whole request.
    pub fn message(path: &str, body: &Value) -> Vec<u8> {
        let body = body.to_string();
        let head = Self::head(path, &format!("Content-Length: {}\r\n", body.len()));
        [head.as_bytes(), body.as_bytes()].concat()
    }

    fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.id)
    }

    /// Asked for when no connection is open.
    pub fn held(&self) -> Held {
        let status = std::fs::read_to_string(self.file("status")).unwrap();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        let count = |name: &str| std::fs::read_dir(self.file(name)).unwrap().count();
        Held {
            resident_kib: resident.split_whitespace().next().unwrap().parse().unwrap(),
            descriptors: count("fd"),
            threads: count("task"),
        }
    }

    /// What runs, waits, or is kept for something that runs, by its metric; empty when idle.
    fn busy(&self) -> Vec<(&'static str, f64)> {
        let (status, text) = self.process.lock().unwrap().get("/metrics").unwrap();
        assert_eq!(status, 200, "{text}");
        let names = [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "kimi_linear:state_slots_used",
        ];
        let values = names.map(|name| (name, metric(&text, name)));
        values
            .into_iter()
            .filter(|(_, value)| *value != 0.0)
            .collect()
    }

    /// Waits until `left` is `None`; what is left is in the message of the failure.
    fn wait(&self, left: impl Fn(&Self) -> Option<String>) {
        let mut found = None;
        for _ in 0..LOOKS {
            found = left(self);
            if found.is_none() {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("not given back: {}", found.unwrap_or_default());
    }

    /// Waits until nothing runs or waits and the pools are empty.
    pub fn settle(&self) {
        self.wait(|target| {
            let busy = target.busy();
            (!busy.is_empty()).then(|| format!("{busy:?}"))
        });
    }

    /// Waits until descriptors and threads are no more than they were, too, and memory is given back.
    pub fn settle_to(&self, before: &Held) {
        self.settle();
        self.wait(|target| {
            let held = target.held();
            let more = held.descriptors > before.descriptors
                || held.threads > before.threads
                || held.resident_kib > before.resident_kib + KEPT_KIB;
            more.then(|| format!("{held:?}, where there were {before:?}"))
        });
    }

    /// Ends it, and looks at how it ended and at what it logged.
    pub fn stop(&self) {
        let well = self.process.lock().unwrap().stop();
        let (mut log, mut text) = (self.log.lock().unwrap(), String::new());
        log.rewind().unwrap();
        log.read_to_string(&mut text).unwrap();
        assert!(well && !text.contains("panicked"), "{text}");
    }
}
