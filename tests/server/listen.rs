//! Where the server listens, and under which paths: Unix sockets, TLS, prefixes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kimi_linear::server::{ClientCertificates, HttpTls, HttpTlsFiles, Server, ServerOptions};
use rcgen::CertifiedKey;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

use super::harness::Setup;

/// The response to a GET, with its head.
async fn get(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
) -> std::io::Result<String> {
    let head = format!("GET {path} HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut response = String::new();
    stream.read_to_string(&mut response).await?;
    Ok(response)
}

/// A server without a model, until the sender is used.
fn run(server: Server) -> (oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    (stop, task)
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_made_and_removed() {
    use tokio::net::UnixStream;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.sock");
    let bind = || Server::bind_unix(&path, ServerOptions::new("m"));
    let server = bind().await.unwrap();
    assert_eq!(server.url(), format!("unix:{}", path.display()));
    assert_eq!(server.address(), None);
    let (stop, task) = run(server);
    let response = get(UnixStream::connect(&path).await.unwrap(), "/version").await;
    assert!(response.unwrap().starts_with("HTTP/1.1 200"));
    // While it listens, no other server takes its path.
    let error = bind().await.err().unwrap();
    assert!(
        error.to_string().contains("another server listens"),
        "{error}"
    );
    stop.send(()).unwrap();
    task.await.unwrap();
    assert!(!path.exists());
    // A socket that a killed server has left is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = bind().await.unwrap();
    // The file of a server that came after this one is not removed.
    std::fs::remove_file(&path).unwrap();
    let later = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    drop(later);
    // Other files are never removed.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    let error = bind().await.err().unwrap();
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

/// A certificate for localhost that is its own CA, in files.
struct Own {
    certificate: PathBuf,
    key: PathBuf,
}

fn own(folder: &Path, name: &str) -> Own {
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let own = Own {
        certificate: folder.join(format!("{name}.crt")),
        key: folder.join(format!("{name}.key")),
    };
    std::fs::write(&own.certificate, cert.pem()).unwrap();
    std::fs::write(&own.key, signing_key.serialize_pem()).unwrap();
    own
}

/// GETs over TLS of a version, with a certificate of the client if it has one.
async fn get_over_tls(
    server: std::net::SocketAddr,
    ca: &Own,
    client: Option<&Own>,
    version: &'static SupportedProtocolVersion,
) -> std::io::Result<String> {
    let certificate = |own: &Own| CertificateDer::from_pem_file(&own.certificate).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate(ca)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
            config
                .with_client_auth_cert(vec![certificate(own)], key)
                .unwrap()
        }
    };
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TcpStream::connect(server).await?;
    let connector = TlsConnector::from(Arc::new(config));
    get(connector.connect(name, stream).await?, "/version").await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_connect_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (server_files, known, unknown) = (
        own(folder.path(), "server"),
        own(folder.path(), "known"),
        own(folder.path(), "unknown"),
    );
    let listen = async |client_certificates| {
        let mut options = ServerOptions::new("m");
        options.hosts = vec!["*".to_owned()];
        let files = HttpTlsFiles {
            certificate: server_files.certificate.clone(),
            key: Some(server_files.key.clone()),
            client_ca: Some(known.certificate.clone()),
            client_certificates,
        };
        options.tls = Some(HttpTls::from_files(&files).unwrap());
        let server = Server::bind(("127.0.0.1", 0), options).await.unwrap();
        let address = server.address().unwrap();
        assert_eq!(server.url(), format!("https://{address}"));
        (address, run(server))
    };
    let (v12, v13) = (&rustls::version::TLS12, &rustls::version::TLS13);
    for (asked, without, wrong) in [
        (ClientCertificates::None, true, true),
        (ClientCertificates::Optional, true, false),
        (ClientCertificates::Required, false, false),
    ] {
        let (address, _running) = listen(asked).await;
        for version in [v12, v13] {
            for (client, expected) in [
                (None, without),
                (Some(&known), true),
                (Some(&unknown), wrong),
            ] {
                let response = get_over_tls(address, &server_files, client, version).await;
                let is_answered = response.is_ok_and(|text| text.starts_with("HTTP/1.1 200"));
                assert_eq!(is_answered, expected, "{asked:?} {version:?}");
            }
        }
        // Plain HTTP is not answered, and a client that says nothing holds up no other.
        let silent = TcpStream::connect(address).await.unwrap();
        let plain = get(TcpStream::connect(address).await.unwrap(), "/version").await;
        assert!(!plain.is_ok_and(|text| text.contains("200 OK")));
        let response = get_over_tls(address, &server_files, Some(&known), v13).await;
        assert!(response.is_ok());
        drop(silent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_answered_with_a_prefix_and_without() {
    let mut setup = Setup::default();
    setup.options.root_path = "/some/llm".to_owned();
    let server = setup.start().await;
    for prefix in ["", "/some/llm"] {
        assert_eq!(server.get(&format!("{prefix}/v1/models")).await.0, 200);
        let body = serde_json::json!({ "prompt": "Hi", "max_tokens": 1 });
        let found = server
            .post(&format!("{prefix}/v1/completions?x=1"), body)
            .await;
        assert_eq!(found.0, 200, "{found:?}");
        let (status, api) = server.get(&format!("{prefix}/openapi.json")).await;
        assert_eq!(
            (status, &api["servers"][0]["url"]),
            (200, &"/some/llm".into())
        );
        // The page's links are relative to its own address.
        let page = server.get_text(&format!("{prefix}/")).await;
        assert!(page.contains("src=\"page/chat.js\""), "{page}");
        assert!(
            server
                .get_text(&format!("{prefix}/page/chat.js"))
                .await
                .contains("v1/chat")
        );
    }
    // Without the slash the links would lead elsewhere.
    let page = server
        .client
        .get(format!("{}/some/llm", server.url))
        .send()
        .await
        .unwrap();
    assert_eq!(
        (page.status().as_u16(), page.url().path()),
        (200, "/some/llm/")
    );
    for other in ["/some/llmx/v1/models", "/some/v1/models"] {
        assert_eq!(server.get(other).await.0, 404, "{other}");
    }
    let plain = super::harness::start().await;
    assert!(plain.get("/openapi.json").await.1.get("servers").is_none());
}
