//! A server of models, which sends ranges of files as the first part of an address says, to pages of any other address.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The requests for `model.safetensors`: the manner, and how many bytes were sent.
pub type Requests = Arc<Mutex<Vec<(String, usize)>>>;

/// Number of requests for weights that a server answers before something happens.
const ANSWERED: usize = 20;

/// Serves the demo model's folder below `/MANNER/` for as long as the test runs; its address and the requests.
pub fn serve() -> (String, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let requests = Requests::default();
    let all = Arc::clone(&requests);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let requests = Arc::clone(&requests);
            std::thread::spawn(move || answer(stream, &requests));
        }
    });
    (url, all)
}

/// Answers one request.
fn answer(mut stream: TcpStream, requests: &Requests) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let lines: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();
    let mut words = first.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let (manner, name) = path[1..].split_once('/')?;
    let allowed = match manner {
        "closed" => "",
        _ => {
            "Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: Range\r\nAccess-Control-Expose-Headers: Content-Range\r\n"
        }
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo");
    let bytes = match std::fs::read(folder.join(name)) {
        Ok(bytes) if method == "GET" => bytes,
        found => {
            let status = if found.is_ok() {
                "204 No Content"
            } else {
                "404 Not Found"
            };
            return write!(
                stream,
                "HTTP/1.1 {status}\r\n{allowed}Content-Length: 0\r\nConnection: close\r\n\r\n"
            )
            .ok();
        }
    };
    let range = lines.iter().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("range: bytes=")
            .map(str::to_owned)
    });
    let (start, end) = match range.filter(|_| manner != "whole") {
        Some(range) => {
            let (start, last) = range.split_once('-')?;
            (
                start.parse().ok()?,
                (last.parse::<usize>().ok()? + 1).min(bytes.len()),
            )
        }
        None => (0, bytes.len()),
    };
    let mut late = false;
    if name == "model.safetensors" {
        let mut requests = requests.lock().unwrap();
        late = requests.iter().filter(|(other, _)| other == manner).count() >= ANSWERED;
        requests.push((manner.to_owned(), end - start));
    }
    let status = match manner {
        "whole" => "200 OK".to_owned(),
        _ => format!(
            "206 Partial Content\r\nContent-Range: bytes {start}-{}/{}",
            end - 1,
            bytes.len()
        ),
    };
    let day = if late && manner == "changed" { 2 } else { 1 };
    write!(stream, "HTTP/1.1 {status}\r\n{allowed}Last-Modified: Thu, 0{day} Jan 2026 00:00:00 GMT\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", end - start).ok()?;
    let half = start + (end - start) / 2;
    match manner {
        "cut" if late => stream.write_all(&bytes[start..half]).ok(),
        "silent" if late => {
            stream.write_all(&bytes[start..half]).ok()?;
            std::thread::sleep(Duration::from_secs(60));
            Some(())
        }
        _ => stream.write_all(&bytes[start..end]).ok(),
    }
}
