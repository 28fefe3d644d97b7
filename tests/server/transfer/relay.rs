//! A link between two servers that can be cut, or stand still.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the link does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Link {
    /// It carries what comes.
    Up,
    /// It carries nothing and says nothing: both ends think that they are connected.
    Still,
    /// Connections are closed, and new ones too.
    Cut,
}

/// A link to a port of this machine.
pub(super) struct Relay {
    pub(super) port: u16,
    state: watch::Sender<Link>,
    to: Arc<watch::Sender<u16>>,
}

impl Relay {
    pub(super) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let (state, to) = (watch::Sender::new(Link::Up), watch::Sender::new(port));
        let (seen, to) = (state.subscribe(), Arc::new(to));
        tokio::spawn(accept(listener, seen, Arc::clone(&to)));
        Self {
            port: own,
            state,
            to,
        }
    }

    pub(super) fn set(&self, link: Link) {
        self.state.send_replace(link);
    }

    /// The other end is at another port from now on.
    pub(super) fn move_to(&self, port: u16) {
        self.to.send_replace(port);
    }
}

async fn accept(listener: TcpListener, state: watch::Receiver<Link>, to: Arc<watch::Sender<u16>>) {
    while let Ok((near, _)) = listener.accept().await {
        if *state.borrow() == Link::Cut {
            continue;
        }
        let port = *to.borrow();
        let state = state.clone();
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else {
                return;
            };
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            tokio::select! {
                () = carry(near_read, far_write, state.clone()) => {}
                () = carry(far_read, near_write, state.clone()) => {}
                () = cut(state) => {}
            }
        });
    }
}

async fn cut(mut state: watch::Receiver<Link>) {
    let _ = state.wait_for(|link| *link == Link::Cut).await;
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<Link>) {
    let mut buffer = vec![0; 1 << 14];
    loop {
        let Ok(count) = from.read(&mut buffer).await else {
            return;
        };
        if state.wait_for(|link| *link != Link::Still).await.is_err() {
            return;
        }
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::ZERO).await;
    }
}
