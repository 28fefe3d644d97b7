//! Layer records over loopback, compared with a plain copy of the same bytes over the same number of sockets of the same kind
//! in one run.
//!
//!     cargo bench --locked --bench transfer
//!
//! Each round sends 128 recurrent states of 2 MiB, from the fetch until the hand-off has arrived. The plain copy writes the
//! same records' bytes and reads each record into memory of its own. The second copy writes one buffer of 2 MiB repeatedly
//! and reads into another, so that only the sockets cost time. All are measured in each round; results are medians of the
//! rounds.
#![allow(clippy::print_stdout, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kimi_linear::Error;
use kimi_linear::backend::{LatentLayout, Shard, StateLayout};
use kimi_linear::cache::{CacheHeader, CacheLayout, LayerRecord, LayerTensor};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::config::Dtype;
use kimi_linear::transfer::{
    Consumer, Identity, Outgoing, Producer, RecordSource, Tls, TlsPem, TransferOptions,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Heads, K and V of a recurrent state.
const SHAPE: [usize; 3] = [32, 128, 128];
const RECORDS: usize = 128;
const BYTES: usize = SHAPE[0] * SHAPE[1] * SHAPE[2] * 4;
const ROUNDS: usize = 9;
const CONNECTIONS: [usize; 2] = [1, 8];

const LAYOUT: CacheLayout = CacheLayout {
    states: StateLayout {
        layers: RECORDS,
        key_heads: SHAPE[0],
        value_heads: SHAPE[0],
        key_width: SHAPE[1],
        value_width: SHAPE[2],
        taps: 4,
        slots: 1,
    },
    latents: LatentLayout {
        layers: 1,
        latent: 512,
        rope: 64,
        block_tokens: 64,
        blocks: 1,
        dtype: Dtype::F32,
    },
    shard: Shard::WHOLE,
};

/// Records that exist already, the last first.
struct Ready(Vec<LayerRecord>);

impl RecordSource for Ready {
    fn skip_latents(&mut self, _: usize) {}

    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>> {
        self.0.pop().map(Ok)
    }
}

fn records(header: &CacheHeader) -> Vec<LayerRecord> {
    let record = |layer| {
        LayerRecord {
            id: header.id(),
            tensor: LayerTensor::State,
            layer,
            heads: 0..SHAPE[0],
            positions: 0..header.tokens.len(),
            dtype: Dtype::F32,
            shape: SHAPE.to_vec(),
            bytes: vec![layer as u8; BYTES],
            checksum: 0,
        }
        .sealed()
    };
    (0..RECORDS).map(record).collect()
}

/// A certificate for loopback, and its key, as PEM.
struct Certificate {
    certificate: String,
    key: String,
}

impl Certificate {
    fn new() -> Result<Self> {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        Ok(Self {
            certificate: cert.pem(),
            key: signing_key.serialize_pem(),
        })
    }

    fn tls(&self) -> Result<(Tls, Tls)> {
        let certificate = Some(self.certificate.as_bytes());
        let own = TlsPem {
            certificate,
            key: Some(self.key.as_bytes()),
            ..TlsPem::default()
        };
        let ca = TlsPem {
            ca: certificate,
            ..TlsPem::default()
        };
        Ok((Tls::new(own)?, Tls::new(ca)?))
    }

    /// The same for sockets without the transfer protocol.
    fn plain(&self) -> Result<(TlsAcceptor, TlsConnector)> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = [&rustls::version::TLS13];
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes())?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone())?;
        let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok((Arc::new(server).into(), Arc::new(client).into()))
    }
}

/// A producer and a consumer that are connected.
struct Pair {
    producer: Producer,
    consumer: Consumer,
    header: CacheHeader,
}

impl Pair {
    async fn new(connections: usize, tls: Option<&Certificate>) -> Result<Self> {
        let identity = Identity::of(Fingerprint(1), &LAYOUT, "bf16");
        let (ours, theirs) = tls.map(Certificate::tls).transpose()?.unzip();
        let options = |tls| TransferOptions {
            connections,
            tls,
            ..TransferOptions::default()
        };
        Ok(Self {
            producer: Producer::listen("127.0.0.1:0", identity.clone(), options(ours)).await?,
            consumer: Consumer::new(identity, options(theirs)),
            header: CacheHeader {
                model: Fingerprint(1),
                tokens: vec![1; 64],
            },
        })
    }

    async fn send(&self) -> Result<Duration> {
        let outgoing = Outgoing {
            header: self.header.clone(),
            records: Box::new(Ready(records(&self.header))),
            hand_off: Box::pin(async { Ok(Vec::new()) }),
        };
        let start = Instant::now();
        let offer = self.producer.offer("bench".to_owned(), outgoing)?;
        let address = self.producer.local_addr().to_string();
        let mut incoming = self
            .consumer
            .fetch(&address, "bench", 0, &self.header)
            .await?;
        let mut count = 0;
        while incoming.next().await?.is_some() {
            count += 1;
        }
        incoming.hand_off().await?;
        let time = start.elapsed();
        anyhow::ensure!(count == RECORDS, "{count} records came");
        offer.finished().await;
        // The name can be used again once the producer has dropped the transfer.
        while self.producer.stats().active > 0 {
            tokio::task::yield_now().await;
        }
        Ok(time)
    }
}

trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

/// Connected sockets, both ends.
async fn sockets(
    connections: usize,
    tls: Option<&Certificate>,
) -> Result<Vec<[Box<dyn Socket>; 2]>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let tls = tls.map(Certificate::plain).transpose()?;
    let mut all: Vec<[Box<dyn Socket>; 2]> = Vec::new();
    for _ in 0..connections {
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (near, far) = (near?, far?.0);
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        all.push(match &tls {
            None => [Box::new(near), Box::new(far)],
            Some((acceptor, connector)) => {
                let name = ServerName::try_from("127.0.0.1")?;
                let (near, far) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
                [Box::new(near?), Box::new(far?)]
            }
        });
    }
    Ok(all)
}

/// Copies the same number of bytes as the records have: the records' own, each to memory of its own, or from one buffer to
/// another.
async fn copy(
    sockets: &mut Vec<[Box<dyn Socket>; 2]>,
    mut records: Option<Vec<LayerRecord>>,
) -> Result<Duration> {
    let count = RECORDS / sockets.len();
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for [mut near, mut far] in sockets.drain(..) {
        let keeps = records.is_some();
        let own = records.as_mut().map(|all| all.split_off(all.len() - count));
        let write = tokio::spawn(async move {
            if let Some(own) = own {
                for record in own {
                    far.write_all(&record.bytes).await?;
                }
            } else {
                let bytes = vec![1; BYTES];
                for _ in 0..count {
                    far.write_all(&bytes).await?;
                }
            }
            far.flush().await?;
            Ok::<_, std::io::Error>(far)
        });
        tasks.spawn(async move {
            let mut bytes = vec![0; BYTES];
            for _ in 0..count {
                if keeps {
                    bytes = Vec::with_capacity(BYTES);
                    let mut record = (&mut near).take(BYTES as u64);
                    while record.limit() > 0 {
                        record.read_buf(&mut bytes).await?;
                    }
                    std::hint::black_box(&bytes);
                } else {
                    near.read_exact(&mut bytes).await?;
                }
            }
            Ok::<_, std::io::Error>([near, write.await??])
        });
    }
    while let Some(pair) = tasks.join_next().await {
        sockets.push(pair??);
    }
    Ok(start.elapsed())
}

fn rate(times: &mut [Duration]) -> f64 {
    times.sort();
    (RECORDS * BYTES) as f64 / times[times.len() / 2].as_secs_f64() / 1e9
}

async fn measure() -> Result<()> {
    let certificate = Certificate::new()?;
    println!(
        "| connections | TLS | transfer GB/s | plain copy GB/s | ratio | one buffer GB/s | ratio |"
    );
    println!("|---:|---|---:|---:|---:|---:|---:|");
    for tls in [None, Some(&certificate)] {
        for connections in CONNECTIONS {
            let pair = Pair::new(connections, tls).await?;
            let mut sockets = sockets(connections, tls).await?;
            let mut times = [Vec::new(), Vec::new(), Vec::new()];
            for round in 0..=ROUNDS {
                let all = [
                    pair.send().await?,
                    copy(&mut sockets, Some(records(&pair.header))).await?,
                    copy(&mut sockets, None).await?,
                ];
                // The first round connects and warms up.
                if round > 0 {
                    times
                        .iter_mut()
                        .zip(all)
                        .for_each(|(all, time)| all.push(time));
                }
            }
            let [transfer, plain, buffer] = times.each_mut().map(|times| rate(times));
            let tls = if tls.is_some() { "1.3" } else { "" };
            let [first, second] = [transfer / plain, transfer / buffer];
            println!(
                "| {connections} | {tls} | {transfer:.2} | {plain:.2} | {first:.2} | {buffer:.2} | {second:.2} |"
            );
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(measure())
}
