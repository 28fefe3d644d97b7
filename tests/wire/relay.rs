//! A relay between a consumer and its producer, which simulates failures of a network.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, Default)]
struct Weather {
    /// Connections with a lower number are cut.
    cut: u64,
    /// No data passes, and neither side is notified.
    frozen: bool,
    /// New connections are closed.
    down: bool,
}

pub struct Relay {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    weather: watch::Sender<Weather>,
    /// Number of bytes from the producer until one is damaged, or until connections are cut; below 0 is never.
    damage_in: AtomicI64,
    cut_in: AtomicI64,
    delay: AtomicU64,
    /// Number of bytes from the producer.
    passed: AtomicU64,
}

impl Relay {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            weather: watch::Sender::new(Weather::default()),
            damage_in: AtomicI64::new(-1),
            cut_in: AtomicI64::new(-1),
            delay: AtomicU64::new(0),
            passed: AtomicU64::new(0),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let Weather { cut, down, .. } = *shared.weather.borrow();
                if down {
                    continue;
                }
                let Ok(far) = TcpStream::connect(target).await else {
                    continue;
                };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                let state = || Arc::clone(&shared);
                tokio::spawn(pass(state(), near_read, far_write, cut, false));
                tokio::spawn(pass(state(), far_read, near_write, cut, true));
            }
        });
        Self { address, state }
    }

    /// Cuts all existing connections.
    pub fn cut(&self) {
        self.state.weather.send_modify(|it| it.cut += 1);
    }

    /// Cuts all connections, and sets whether new ones are accepted from now on.
    pub fn set_down(&self, down: bool) {
        self.state.weather.send_modify(|it| it.down = down);
        if down {
            self.cut();
        }
    }

    pub fn set_frozen(&self, frozen: bool) {
        self.state.weather.send_modify(|it| it.frozen = frozen);
    }

    pub fn set_delay(&self, delay: Duration) {
        self.state.delay.store(delay.as_micros() as u64, SeqCst);
    }

    /// Flips a bit of the byte from the producer after this number of bytes.
    pub fn damage_in(&self, bytes: i64) {
        self.state.damage_in.store(bytes, SeqCst);
    }

    /// Cuts all connections after this number of bytes from the producer.
    pub fn cut_in(&self, bytes: i64) {
        self.state.cut_in.store(bytes, SeqCst);
    }

    pub fn has_damaged(&self) -> bool {
        self.state.damage_in.load(SeqCst) < 0
    }

    pub fn has_cut(&self) -> bool {
        self.state.cut_in.load(SeqCst) < 0
    }

    pub fn passed(&self) -> u64 {
        self.state.passed.load(SeqCst)
    }
}

/// Counts down; returns the index in these bytes at which it reached zero.
fn counted(counter: &AtomicI64, bytes: usize) -> Option<usize> {
    let left = counter.fetch_sub(bytes as i64, SeqCst);
    if left < 0 {
        // Off: a count below 0 stays below 0.
        counter.store(-1, SeqCst);
        return None;
    }
    (left < bytes as i64).then_some(left as usize)
}

async fn pass(
    state: Arc<State>,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    born: u64,
    from_producer: bool,
) {
    let mut weather = state.weather.subscribe();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            _ = weather.wait_for(|it| it.cut != born) => return,
        };
        if count == 0 {
            return;
        }
        if from_producer {
            state.passed.fetch_add(count as u64, SeqCst);
            if let Some(at) = counted(&state.damage_in, count) {
                buffer[at] ^= 16;
            }
            if counted(&state.cut_in, count).is_some() {
                state.weather.send_modify(|it| it.cut += 1);
                return;
            }
        }
        let delay = Duration::from_micros(state.delay.load(SeqCst));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let clear = weather.wait_for(|it| !it.frozen || it.cut != born).await;
        if clear.unwrap().cut != born {
            return;
        }
        tokio::select! {
            written = to.write_all(&buffer[..count]) => {
                if written.is_err() {
                    return;
                }
            }
            _ = weather.wait_for(|it| it.cut != born) => return,
        }
    }
}
