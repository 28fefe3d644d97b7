//! A model on two and on four processes while nodes are killed and stopped, the server itself is killed, and strangers connect:
//! each request is answered as before or fails with a sentence, and the processes that live find each other again.
//!
//! `KIMI_LINEAR_NODE_FAULTS` is the number of faults of each seed and number of processes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::harness::model_dir;
use super::program::{Process, program, serve};
use super::seeds;

/// Longest time for a request, and for the processes to find each other again.
const PATIENCE: Duration = Duration::from_secs(120);

const QUESTIONS: [&str; 3] = [
    "The red box holds 7. The blue box holds 2. What does the red box hold?",
    "Repeat: sun, moon, tree, bird, star.",
    "Anna goes to the park. Anna takes the ball. Where is the ball?",
];

/// A node in a process of its own.
struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cluster {
    flags: Vec<String>,
    server: Process,
    /// The nodes from 1 on.
    nodes: Vec<Node>,
    port: u16,
    folder: tempfile::TempDir,
    expected: Vec<Value>,
}

/// What a request was answered with: a text, or an error's sentence.
type Answer = Result<Value, String>;

fn ask(url: &str, question: &str) -> Answer {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let body = json!({
        "messages": [{ "role": "user", "content": question }], "temperature": 0, "max_tokens": 24,
    });
    runtime.block_on(async {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build();
        let sent = client
            .unwrap()
            .post(format!("{url}/v1/chat/completions"))
            .json(&body)
            .send();
        let response = sent.await.map_err(|error| {
            assert!(!error.is_timeout(), "a request hangs");
            "no connection to node 0".to_owned()
        })?;
        let status = response.status().as_u16();
        let answer: Value = match response.json().await {
            Ok(answer) => answer,
            Err(error) if error.is_timeout() => panic!("an answer hangs"),
            Err(_) => return Err("no connection to node 0".to_owned()),
        };
        match status {
            200 => Ok(answer["choices"][0]["message"]["content"].clone()),
            500 | 503 => Err(answer["error"]["message"].as_str().unwrap().to_owned()),
            _ => panic!("{status}: {answer}"),
        }
    })
}

fn start_node(flags: &[String], number: usize, model: &Path) -> Command {
    let mut command = program();
    command.args(["serve", "--backend", "cpu", "--model"]);
    command.arg(model).args(flags);
    command.args(["--node-rank", &number.to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn start_server(flags: &[String]) -> Process {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut command = serve(&flags);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    Process::of(command.spawn().unwrap())
}

impl Cluster {
    fn start(degrees: &[&str], count: usize) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut flags: Vec<String> = degrees.iter().map(|&flag| flag.to_owned()).collect();
        flags.extend(["--nnodes".to_owned(), count.to_string()]);
        flags.extend(["--master-port".to_owned(), port.to_string()]);
        flags.extend(["--max-model-len".to_owned(), "1024".to_owned()]);
        let nodes = (1..count)
            .map(|number| Node(start_node(&flags, number, &model_dir()).spawn().unwrap()));
        let nodes = nodes.collect();
        let server = start_server(&flags);
        let expected = QUESTIONS.map(|question| ask(&server.url, question).unwrap());
        Self {
            flags,
            server,
            nodes,
            port,
            folder: tempfile::tempdir().unwrap(),
            expected: expected.to_vec(),
        }
    }

    /// Requests while `fault` happens: each is answered as ever, or fails with a sentence about a node.
    fn during(&mut self, random: &mut impl Rng, fault: impl FnOnce(&mut Self)) -> usize {
        let url = self.server.url.clone();
        let expected = self.expected.clone();
        let failed = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for i in 0..4 {
                let wait = Duration::from_millis(random.random_range(0..600));
                let (url, expected, failed) = (&url, &expected, &failed);
                scope.spawn(move || {
                    std::thread::sleep(wait);
                    let which = i % QUESTIONS.len();
                    match ask(url, QUESTIONS[which]) {
                        Ok(answer) => assert_eq!(answer, expected[which]),
                        Err(error) => {
                            assert!(error.contains("node "), "{error}");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(random.random_range(0..600)));
            fault(self);
        });
        failed.into_inner()
    }

    /// Waits until requests are answered again.
    fn whole_again(&self) {
        let began = Instant::now();
        for (question, expected) in QUESTIONS.iter().zip(&self.expected) {
            let answer = loop {
                match ask(&self.server.url, question) {
                    Ok(answer) => break answer,
                    Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
                }
                std::thread::sleep(Duration::from_millis(100));
            };
            assert_eq!(answer, *expected);
        }
    }

    fn signal(&self, node: usize, name: &str) {
        let id = self.nodes[node].0.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &id])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Kills a node, and starts it again after a while.
    fn kill(&mut self, node: usize, pause: Duration) {
        let started = &mut self.nodes[node].0;
        started.kill().unwrap();
        started.wait().unwrap();
        std::thread::sleep(pause);
        let again = start_node(&self.flags, node + 1, &model_dir()).spawn();
        self.nodes[node] = Node(again.unwrap());
    }

    /// Kills the server, and starts it again: the nodes join it by themselves.
    fn kill_server(&mut self) {
        self.server.kill();
        self.server = start_server(&self.flags);
    }

    /// A node of another model, or with other weights, is told so and ends.
    fn foreign(&self, node: usize, weights: bool) {
        let model = match weights {
            true => self.other_weights(),
            false => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny-a"),
        };
        let flags = match weights {
            true => self.flags.clone(),
            // The degrees would not divide that model, which is another reason to end.
            false => ["--ep-size", "2", "--nnodes", "2", "--master-port"]
                .map(str::to_owned)
                .into_iter()
                .chain([self.port.to_string()])
                .collect(),
        };
        let number = if weights { node + 1 } else { 1 };
        let mut foreign = start_node(&flags, number, &model)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let began = Instant::now();
        let status = loop {
            if let Some(status) = foreign.try_wait().unwrap() {
                break status;
            }
            assert!(began.elapsed() < PATIENCE, "it was taken");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut said = String::new();
        foreign.stderr.unwrap().read_to_string(&mut said).unwrap();
        assert!(!status.success(), "{said}");
        assert!(
            said.contains("the peer refused: the model fingerprint of this side is"),
            "{said}"
        );
    }

    /// The same model with a weight that is not the same.
    fn other_weights(&self) -> PathBuf {
        let folder = self.folder.path().join("other");
        if folder.exists() {
            return folder;
        }
        std::fs::create_dir(&folder).unwrap();
        for entry in std::fs::read_dir(model_dir()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
            }
        }
        let weights = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(weights, bytes).unwrap();
        folder
    }

    /// Bytes that are no handshake, and a connection that says nothing.
    fn garbage(&self, random: &mut impl Rng) {
        let mut bytes = vec![0; random.random_range(1..100_000)];
        random.fill_bytes(&mut bytes);
        let address = ("127.0.0.1", self.port);
        let _silent = TcpStream::connect(address).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        // It may be closed before all is written.
        let _ = stream.write_all(&bytes);
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// As many faults as asked for, by default a few; a stop is of ten seconds, or by default of two.
fn faults(seed: u64, degrees: &[&str], count: usize) {
    let asked = std::env::var("KIMI_LINEAR_NODE_FAULTS").ok();
    let (number, stop) = match &asked {
        Some(asked) => (asked.parse().unwrap(), 10),
        None => (5, 2),
    };
    let mut random = ChaCha8Rng::seed_from_u64(seeds::printed(seed));
    let mut cluster = Cluster::start(degrees, count);
    let mut failed = 0;
    // Each kind once, then any.
    for i in 0..number {
        let kind = if i < 5 { i } else { random.random_range(0..5) };
        let node = random.random_range(0..count - 1);
        let pause = Duration::from_millis(random.random_range(0..1500));
        let mut inner = ChaCha8Rng::seed_from_u64(random.random());
        failed += cluster.during(&mut random, |cluster| match kind {
            0 => cluster.kill(node, pause),
            1 => {
                cluster.signal(node, "-STOP");
                std::thread::sleep(Duration::from_secs(stop));
                cluster.signal(node, "-CONT");
            }
            2 => cluster.kill_server(),
            3 => cluster.foreign(node, inner.random()),
            _ => cluster.garbage(&mut inner),
        });
        cluster.whole_again();
    }
    println!(
        "{number} faults, {failed} of {} requests failed with a sentence",
        4 * number
    );
}

/// Tensor parallelism: a rank on each of two nodes.
#[test]
fn faults_of_two_processes() {
    for seed in [seeds::FIXED, seeds::drawn()] {
        faults(seed, &["--tp", "2"], 2);
    }
}

/// Two stages whose experts are divided: a rank on each of four nodes.
#[test]
fn faults_of_four_processes() {
    for seed in [seeds::FIXED, seeds::drawn()] {
        faults(seed, &["--ep-size", "2", "--pp", "2"], 4);
    }
}
