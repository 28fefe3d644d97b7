//! The page's files over HTTP, as any static host serves them: without special headers.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

/// The folder of the page that `make test` has made; `None` where that was not possible and left word of it.
fn folder() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    if target.join("no-web").exists() {
        println!("skipped: the page in a browser: no compiler for WebAssembly can be had");
        return None;
    }
    let folder = target.join("web");
    let there = folder.join("index.html").exists();
    assert!(there, "there is no page: .ci/build-web makes it");
    Some(folder)
}

/// Serves the page for as long as the test runs; its address.
pub fn serve() -> Option<String> {
    let folder = folder()?;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let folder = folder.clone();
            std::thread::spawn(move || answer(&folder, stream));
        }
    });
    Some(url)
}

/// Answers one request. A browser may give up a connection, which is no failure of the page.
fn answer(folder: &Path, mut stream: TcpStream) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    lines.map_while(Result::ok).find(String::is_empty)?;
    let path = first.split(' ').nth(1)?.split('?').next()?;
    let path = if path == "/" { "/index.html" } else { path };
    let kind = match path.rsplit('.').next()? {
        "html" => "text/html",
        "js" => "text/javascript",
        "wasm" => "application/wasm",
        _ => "application/octet-stream",
    };
    let (status, bytes) = match std::fs::read(folder.join(&path[1..])) {
        Ok(bytes) => ("200 OK", bytes),
        Err(_) => ("404 Not Found", Vec::new()),
    };
    let length = bytes.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").ok()?;
    stream.write_all(&bytes).ok()
}
