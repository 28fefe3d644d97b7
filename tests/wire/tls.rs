//! TLS with certificates of a CA that is made for the test.

use kimi_linear::error::TransferError;
use kimi_linear::transfer::{Secret, Tls, TlsPem, TransferOptions};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::peers::{consumer, fetch, options, outgoing, producer, run};
use crate::raw::Raw;
use crate::records::{Listed, SMALL, assert_same, header, records};

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// A certificate for this name, and its key.
    fn certificate(&self, name: &str) -> (String, String) {
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

fn tls(own: Option<&(String, String)>, ca: Option<&Ca>, name: Option<&str>) -> Tls {
    Tls::new(TlsPem {
        certificate: own.map(|own| own.0.as_bytes()),
        key: own.map(|own| own.1.as_bytes()),
        ca: ca.map(|ca| ca.pem.as_bytes()),
        server_name: name,
    })
    .unwrap()
}

fn with(tls: Option<Tls>) -> TransferOptions {
    TransferOptions {
        tls,
        secret: Secret::new(b"a secret, long enough").unwrap(),
        ..options()
    }
}

/// A transfer between a producer and a consumer with these.
async fn transfer(ours: Option<Tls>, theirs: Option<Tls>) -> Result<(), TransferError> {
    let (producer, consumer) = (producer(with(ours)).await, consumer(with(theirs)));
    let header = header(100, 1);
    let sent = records(&header, &SMALL, 2);
    let offered = outgoing(&header, Listed::new(sent.clone()));
    let _offer = producer.offer("x".into(), offered).unwrap();
    let came = fetch(&consumer, producer.local_addr(), "x", &header).await?;
    assert_same(&sent, &came);
    Ok(())
}

#[test]
fn encrypted() {
    run(async {
        let ca = Ca::new("ours");
        let own = ca.certificate("127.0.0.1");
        transfer(
            Some(tls(Some(&own), None, None)),
            Some(tls(None, Some(&ca), None)),
        )
        .await
        .unwrap();
        // With another name than the address.
        let named = ca.certificate("prefill.example");
        let ours = || Some(tls(Some(&named), None, None));
        transfer(ours(), Some(tls(None, Some(&ca), Some("prefill.example"))))
            .await
            .unwrap();
        let error = transfer(ours(), Some(tls(None, Some(&ca), None)))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("TLS"), "{error}");
    });
}

#[test]
fn of_another_ca() {
    run(async {
        let (ca, other) = (Ca::new("ours"), Ca::new("another"));
        let own = ca.certificate("127.0.0.1");
        let ours = Some(tls(Some(&own), None, None));
        let error = transfer(ours, Some(tls(None, Some(&other), None)))
            .await
            .unwrap_err();
        assert!(matches!(error, TransferError::Tls { .. }), "{error}");
        assert!(error.to_string().contains("certificate"), "{error}");
    });
}

#[test]
fn mutual() {
    run(async {
        let (ca, other) = (Ca::new("ours"), Ca::new("another"));
        let (own, client) = (ca.certificate("127.0.0.1"), ca.certificate("decode"));
        let ours = || Some(tls(Some(&own), Some(&ca), None));
        transfer(ours(), Some(tls(Some(&client), Some(&ca), None)))
            .await
            .unwrap();
        let stranger = other.certificate("decode");
        for (client, part) in [
            (None, "CertificateRequired"),
            (Some(&stranger), "UnknownCA"),
        ] {
            let theirs = Some(tls(client, Some(&ca), None));
            let error = transfer(ours(), theirs).await.unwrap_err().to_string();
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
    });
}

#[test]
fn one_side_without() {
    run(async {
        let ca = Ca::new("ours");
        let own = ca.certificate("127.0.0.1");
        transfer(Some(tls(Some(&own), None, None)), None)
            .await
            .unwrap_err();
        let error = transfer(None, Some(tls(None, Some(&ca), None)))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("TLS"), "{error}");
        // Bytes that are not TLS are refused.
        let producer = producer(with(Some(tls(Some(&own), None, None)))).await;
        let mut raw = Raw::to(producer.local_addr()).await;
        raw.send(b"GET / HTTP/1.1\r\n\r\n").await;
        crate::peers::until("it is refused", || {
            producer.stats().connections_refused == 1
        })
        .await;
    });
}

#[test]
fn what_tls_cannot_use() {
    let ca = Ca::new("ours");
    let (certificate, key) = ca.certificate("a");
    let (_, other) = ca.certificate("b");
    let pem = TlsPem::default();
    let cases = [
        (pem, "neither a certificate nor a CA"),
        (
            TlsPem {
                certificate: Some(certificate.as_bytes()),
                ..pem
            },
            "one is given without the other",
        ),
        (
            TlsPem {
                certificate: Some(key.as_bytes()),
                key: Some(key.as_bytes()),
                ..pem
            },
            "no certificate is in it",
        ),
        (
            TlsPem {
                certificate: Some(certificate.as_bytes()),
                key: Some(certificate.as_bytes()),
                ..pem
            },
            "the key",
        ),
        (
            TlsPem {
                certificate: Some(certificate.as_bytes()),
                key: Some(other.as_bytes()),
                ..pem
            },
            "the certificate and its key",
        ),
        (
            TlsPem {
                ca: Some(b"nothing"),
                ..pem
            },
            "the CA",
        ),
        (
            TlsPem {
                ca: Some(ca.pem.as_bytes()),
                server_name: Some("no name!"),
                ..pem
            },
            "no name!",
        ),
    ];
    for (pem, part) in cases {
        let error = Tls::new(pem).unwrap_err().to_string();
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    let missing = std::path::Path::new("/nowhere/ca.pem");
    let error = Tls::from_files(None, None, Some(missing), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nowhere/ca.pem"), "{error}");
    run(async {
        let ca = Ca::new("ours");
        let only_ca = with(Some(tls(None, Some(&ca), None)));
        let identity = crate::peers::identity_of(&SMALL);
        let listening = kimi_linear::transfer::Producer::listen("127.0.0.1:0", identity, only_ca);
        let error = listening.await.err().unwrap().to_string();
        assert!(error.contains("a producer needs a certificate"), "{error}");
    });
}
