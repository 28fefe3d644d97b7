//! A hub on the loopback interface, with a second host that it redirects to for large files, and with faults to order.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part, and a test may panic"
)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

/// The commit that is served.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Larger files are in Git LFS, and served by the second host.
pub const SMALL: usize = 4096;

/// What goes wrong with one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Another status, with headers.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Nothing comes after so many bytes of the body, for longer than anyone waits.
    Stall(usize),
    /// The body's first byte is another.
    Wrong,
    /// The hub gives another etag.
    Etag(String),
    /// The range is ignored.
    Whole,
    /// The range is refused.
    Unsatisfiable,
    /// Another range than asked for.
    OtherRange,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The port that was asked.
    pub is_hub: bool,
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
}

#[derive(Default)]
struct State {
    repository: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Per file, or `api` for lists: what goes wrong, request by request.
    faults: HashMap<String, VecDeque<Fault>>,
    asked: Vec<Asked>,
    /// Bytes of bodies sent, per file.
    sent: HashMap<String, usize>,
    /// Entries of a page of the list.
    page: usize,
    /// Added to the list.
    extra: Vec<Value>,
    token: Option<String>,
    gated: bool,
    elsewhere: String,
    here: String,
}

/// A running hub; its threads end with the test.
#[derive(Clone)]
pub struct Hub {
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    /// A hub with one model.
    pub fn with<'a>(repository: &str, files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let files = files
            .into_iter()
            .map(|(path, bytes)| (path.to_owned(), bytes));
        let state = Arc::new(Mutex::new(State {
            repository: repository.to_owned(),
            files: files.collect(),
            page: 1000,
            elsewhere: url(&other),
            here: url(&hub),
            ..State::default()
        }));
        let this = Self {
            url: url(&hub),
            state,
        };
        for (listener, is_hub) in [(hub, true), (other, false)] {
            let served = this.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let served = served.clone();
                    std::thread::spawn(move || while served.answer(&stream, is_hub).is_some() {});
                }
            });
        }
        this
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    /// Orders faults of the next requests for a file's content, or for lists (`api`).
    pub fn fail(&self, what: &str, faults: impl IntoIterator<Item = Fault>) {
        self.change(|state| {
            state
                .faults
                .entry(what.to_owned())
                .or_default()
                .extend(faults)
        });
    }

    pub fn set_page(&self, page: usize) {
        self.change(|state| state.page = page);
    }

    /// Lists something more.
    pub fn list(&self, entry: Value) {
        self.change(|state| state.extra.push(entry));
    }

    /// Requires a token.
    pub fn require(&self, token: &str, gated: bool) {
        self.change(|state| {
            state.token = Some(token.to_owned());
            state.gated = gated;
        });
    }

    /// Every request so far, which are then forgotten.
    pub fn asked(&self) -> Vec<Asked> {
        self.change(|state| std::mem::take(&mut state.asked))
    }

    /// Bytes sent of a file.
    pub fn sent(&self, path: &str) -> usize {
        self.change(|state| state.sent.get(path).copied().unwrap_or_default())
    }

    /// The name of a file's blob.
    pub fn blob(&self, path: &str) -> String {
        self.change(|state| hash(&state.files[path]))
    }

    /// Reads a request and answers it; `None` when the connection has ended.
    fn answer(&self, stream: &TcpStream, is_hub: bool) -> Option<()> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next()?.ok()?;
        let mut words = first.split(' ');
        let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = HashMap::new();
        for line in lines {
            let line = line.ok()?;
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let asked = Asked {
            is_hub,
            method,
            path,
            headers,
        };
        self.change(|state| state.asked.push(asked.clone()));
        let reply = self.change(|state| state.reply(&asked));
        let head = asked.method == "HEAD";
        let status = reply.status;
        let mut text = format!(
            "HTTP/1.1 {status} -\r\nContent-Length: {}\r\n",
            reply.body.len()
        );
        for (name, value) in &reply.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        let mut to = stream;
        to.write_all(text.as_bytes()).ok()?;
        if head {
            return Some(());
        }
        let end = match reply.fault {
            Some(Fault::Cut(end) | Fault::Stall(end)) => end.min(reply.body.len()),
            _ => reply.body.len(),
        };
        self.change(|state| *state.sent.entry(reply.file).or_default() += end);
        to.write_all(&reply.body[..end]).ok()?;
        match reply.fault {
            Some(Fault::Cut(_)) => stream.shutdown(std::net::Shutdown::Both).ok()?,
            Some(Fault::Stall(_)) => std::thread::sleep(Duration::from_secs(2)),
            _ => return Some(()),
        }
        None
    }
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    file: String,
    fault: Option<Fault>,
}

fn reply(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Reply {
    Reply {
        status,
        headers,
        body,
        file: String::new(),
        fault: None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash that the hub gives a file.
pub fn hash(bytes: &[u8]) -> String {
    if bytes.len() > SMALL {
        return hex(digest(&SHA256, bytes).as_ref());
    }
    let git = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &git).as_ref())
}

impl State {
    fn fault(&mut self, what: &str) -> Option<Fault> {
        self.faults.get_mut(what)?.pop_front()
    }

    fn reply(&mut self, asked: &Asked) -> Reply {
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        if let Some(file) = path.strip_prefix("/elsewhere/") {
            return match query {
                "signature=secret" => self.content(file, asked),
                _ => reply(403, Vec::new(), b"no signature".to_vec()),
            };
        }
        if path.contains("/old/name") {
            let to = asked.path.replace("old/name", &self.repository);
            return reply(307, vec![("Location", to)], Vec::new());
        }
        let bearer = self.token.as_ref().map(|token| format!("Bearer {token}"));
        if bearer.is_some() && asked.headers.get("authorization") != bearer.as_ref() {
            let code = if self.gated {
                "GatedRepo"
            } else {
                "RepoNotFound"
            };
            let codes = match asked.headers.contains_key("authorization") {
                true => Vec::new(),
                false => vec![("X-Error-Code", code.to_owned())],
            };
            return reply(401, codes, Vec::new());
        }
        let mine = format!("/{}/resolve/", self.repository);
        if let Some((revision, file)) = path
            .strip_prefix(&mine)
            .and_then(|rest| rest.split_once('/'))
        {
            let known = [COMMIT, "main"].contains(&revision) && self.files.contains_key(file);
            return match known {
                true => self.resolve(file, asked),
                false => reply(
                    404,
                    vec![("X-Error-Code", "EntryNotFound".to_owned())],
                    Vec::new(),
                ),
            };
        }
        let mine = format!("/api/models/{}", self.repository);
        match path.strip_prefix(&mine) {
            Some(rest) => self.api(rest, query),
            None => reply(
                404,
                vec![("X-Error-Code", "RepoNotFound".to_owned())],
                Vec::new(),
            ),
        }
    }

    fn api(&mut self, rest: &str, query: &str) -> Reply {
        if let Some(Fault::Status(status, headers)) = self.fault("api") {
            return reply(status, headers, Vec::new());
        }
        let names: Vec<Value> = self
            .files
            .keys()
            .map(|name| json!({"rfilename": name}))
            .collect();
        let json = |value: Value| {
            reply(
                200,
                vec![("Content-Type", "application/json".to_owned())],
                value.to_string().into_bytes(),
            )
        };
        if ["", "/revision/main", "/revision/refs%2Fpr%2F1"].contains(&rest)
            || rest == format!("/revision/{COMMIT}")
        {
            return json(json!({"id": self.repository, "sha": COMMIT, "siblings": names}));
        }
        if rest
            .strip_prefix("/tree/")
            .is_none_or(|commit| ![COMMIT, "main"].contains(&commit))
        {
            return reply(
                404,
                vec![("X-Error-Code", "RevisionNotFound".to_owned())],
                Vec::new(),
            );
        }
        let entry = |(path, bytes): (&String, &Vec<u8>)| {
            let mut entry = json!({"type": "file", "path": path, "size": bytes.len(), "oid": hash(&bytes[..bytes.len().min(SMALL)])});
            if bytes.len() > SMALL {
                entry["lfs"] = json!({"oid": hash(bytes), "size": bytes.len(), "pointerSize": 134});
            }
            entry
        };
        let mut all = vec![json!({"type": "directory", "path": "sub", "size": 0, "oid": "0"})];
        all.extend(self.files.iter().map(entry));
        all.extend(self.extra.clone());
        let cursor = query
            .split('&')
            .find_map(|part| part.strip_prefix("cursor="))
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        let page: Vec<Value> = all.iter().skip(cursor).take(self.page).cloned().collect();
        let mut page = json(Value::Array(page));
        let next = cursor + self.page;
        if next < all.len() {
            let link = format!(
                "<{}/api/models/{}/tree/{COMMIT}?recursive=true&cursor={next}>; rel=\"next\"",
                self.here, self.repository
            );
            page.headers.push(("Link", link));
        }
        page
    }

    /// The hub's answer to a request for a file.
    fn resolve(&mut self, file: &str, asked: &Asked) -> Reply {
        let bytes = &self.files[file];
        let large = bytes.len() > SMALL;
        let size = bytes.len();
        let mut etag = hash(bytes);
        if let Some(Fault::Etag(other)) = self.faults.get(file).and_then(VecDeque::front) {
            etag = other.clone();
            self.fault(file);
        }
        if !large {
            let mut answer = self.content(file, asked);
            answer.headers.extend([
                ("ETag", format!("\"{etag}\"")),
                ("X-Repo-Commit", COMMIT.to_owned()),
            ]);
            return answer;
        }
        let headers = vec![
            (
                "Location",
                format!("{}/elsewhere/{file}?signature=secret", self.elsewhere),
            ),
            ("X-Linked-Etag", format!("\"{etag}\"")),
            ("X-Linked-Size", size.to_string()),
            ("X-Repo-Commit", COMMIT.to_owned()),
            ("ETag", "\"of-the-pointer\"".to_owned()),
        ];
        reply(302, headers, Vec::new())
    }

    /// A file's bytes, or those of the range that is asked for.
    fn content(&mut self, file: &str, asked: &Asked) -> Reply {
        let mut bytes = self.files[file].clone();
        let head = asked.method == "HEAD";
        let fault = if head { None } else { self.fault(file) };
        if let Some(Fault::Status(status, headers)) = fault {
            return reply(status, headers, Vec::new());
        }
        if matches!(fault, Some(Fault::Wrong)) {
            bytes[0] ^= 1;
        }
        let range = asked
            .headers
            .get("range")
            .and_then(|range| range.strip_prefix("bytes="));
        let range = range.filter(|_| !matches!(fault, Some(Fault::Whole)));
        let mut answer = match range.and_then(|range| range.split_once('-')) {
            None => reply(200, Vec::new(), bytes),
            Some(_) if matches!(fault, Some(Fault::Unsatisfiable)) => {
                reply(416, Vec::new(), Vec::new())
            }
            Some((first, last)) => {
                let last = last.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
                let mut first: usize = first.parse().unwrap();
                if matches!(fault, Some(Fault::OtherRange)) {
                    first -= 1;
                }
                let range = format!("bytes {first}-{last}/{}", bytes.len());
                reply(
                    206,
                    vec![("Content-Range", range)],
                    bytes[first..=last].to_vec(),
                )
            }
        };
        answer.file = file.to_owned();
        answer.fault = fault;
        answer
    }
}
