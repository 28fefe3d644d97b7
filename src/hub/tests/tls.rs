//! Pulls over TLS, with certificates of an authority that only a variable names.

#![allow(clippy::unwrap_used, reason = "tests")]

mod loopback;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use kimi_linear_hub::{HubError, Settings, pull};
use loopback::Hub;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Accepts TLS and passes what comes to the hub; returns the port.
fn in_front_of(
    hub: &Hub,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> u16 {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = Arc::new(
        config
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap(),
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let to = hub.url.trim_start_matches("http://").to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::StreamOwned::new(connection, stream);
            let to = to.clone();
            std::thread::spawn(move || {
                let mut request = vec![0; 1 << 16];
                // A request fits in a read; its answer ends with the connection.
                while let Ok(count @ 1..) = tls.read(&mut request) {
                    let mut plain = TcpStream::connect(&to).unwrap();
                    plain.write_all(&request[..count]).unwrap();
                    plain.shutdown(Shutdown::Write).unwrap();
                    let mut answer = Vec::new();
                    plain.read_to_end(&mut answer).unwrap();
                    tls.write_all(&answer).unwrap();
                }
            });
        }
    });
    port
}

#[test]
fn certificates_are_checked() {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let hub = Hub::with(
        "someone/tiny",
        [
            ("small-Q8_0.gguf", vec![1; 999]),
            ("large-Q4_0.gguf", vec![2; 9999]),
        ],
    );
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let port = in_front_of(&hub, cert.der().clone(), key);
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("certificates.pem");
    std::fs::write(&file, cert.pem()).unwrap();
    let settings = Settings {
        endpoint: format!("https://localhost:{port}").parse().unwrap(),
        cache: home.path().join("hub"),
        token: None,
        offline: false,
        certificates: Some(file),
        timeout: Duration::from_secs(10),
        attempts: 3,
        pause: Duration::from_millis(1),
        jobs: 1,
    };
    let small = "someone/tiny:Q8_0".parse().unwrap();
    let pulled = pull(&settings, &small, None, &|_| {}).unwrap();
    assert_eq!(std::fs::read(pulled.path).unwrap(), [1; 999]);
    let large = "someone/tiny:Q4_0".parse().unwrap();
    let error = pull(&settings, &large, None, &|_| {})
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("expected a redirect to https, found http://127.0.0.1"),
        "{error}"
    );
    let stranger = Settings {
        certificates: None,
        ..settings
    };
    let error = pull(&stranger, &small, None, &|_| {}).unwrap_err();
    assert!(matches!(error, HubError::Certificate { .. }), "{error}");
    assert!(error.to_string().contains("SSL_CERT_FILE"), "{error}");
}
