//! Peers written by hand, which can do what our own peers cannot.

use std::net::SocketAddr;

use kimi_linear::error::{Refusal, TransferError};
use kimi_linear::transfer::Identity;
use kimi_linear::transfer::frame::{self, Frame, HEADER, Header, OPENING};
use ring::hmac;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A socket, and the frames on it.
pub struct Raw(pub TcpStream);

impl Raw {
    pub async fn to(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // A peer that has closed by now has sent its reason before.
        let _ = self.0.write_all(bytes).await;
    }

    pub async fn frame(&mut self, transfer: u32, frame: &Frame) {
        let mut bytes = frame.encode(transfer);
        bytes.extend_from_slice(frame.body());
        self.send(&bytes).await;
    }

    pub async fn opening(&mut self) -> [u8; OPENING] {
        let mut bytes = [0; OPENING];
        self.0.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    /// The next frame that is not a heartbeat; `None` at the end.
    pub async fn next(&mut self) -> Option<(u32, Frame)> {
        loop {
            let mut bytes = [0; HEADER];
            self.0.read_exact(&mut bytes).await.ok()?;
            let header = Header::parse(&bytes, 1 << 20).unwrap();
            let (mut head, mut body) = (vec![0; header.head], vec![0; header.body]);
            self.0.read_exact(&mut head).await.ok()?;
            self.0.read_exact(&mut body).await.ok()?;
            header.check(&head).unwrap();
            let frame = Frame::decode(&header, &head, body).unwrap();
            if frame != Frame::Ping {
                return Some((header.transfer, frame));
            }
        }
    }

    /// The message of a refusal, after which the peer closes.
    pub async fn refused(&mut self) -> (Refusal, String) {
        let Some((0, Frame::Refused { refusal, sentence })) = self.next().await else {
            panic!("the peer did not refuse");
        };
        assert!(self.next().await.is_none(), "the peer went on");
        (refusal, sentence)
    }

    /// A consumer's handshake, written from the protocol's description, with this secret.
    pub async fn handshake(&mut self, secret: &[u8], identity: &Identity) {
        let ours = [7; 32];
        self.send(&frame::opening(frame::VERSION, &ours)).await;
        let theirs = frame::parse_opening(&self.opening().await).unwrap();
        let pool = 0x1234_u128;
        let mut message = b"kimi-linear transfer consumer".to_vec();
        for part in [&ours, &theirs, &[0; 32]] {
            message.extend_from_slice(part);
        }
        message.extend_from_slice(&pool.to_le_bytes());
        // The identity's texts as in the frame, with lengths of eight bytes.
        let draft = |proof| Frame::Prove {
            proof,
            pool,
            identity: identity.clone(),
        };
        let bytes = draft([0; 32]).encode(0);
        let mut texts = &bytes[HEADER + 32 + 16 + 2..];
        while let Some((length, rest)) = texts.split_first_chunk::<2>() {
            let length = usize::from(u16::from_le_bytes(*length));
            message.extend_from_slice(&(length as u64).to_le_bytes());
            message.extend_from_slice(&rest[..length]);
            texts = &rest[length..];
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let mut proof = [0; 32];
        proof.copy_from_slice(hmac::sign(&key, &message).as_ref());
        self.frame(0, &draft(proof)).await;
    }

    /// A consumer whose handshake is done.
    pub async fn consumer(address: SocketAddr, identity: &Identity) -> Self {
        let mut raw = Self::to(address).await;
        raw.handshake(b"", identity).await;
        let welcome = raw.next().await;
        assert!(
            matches!(welcome, Some((0, Frame::Welcome { .. }))),
            "{welcome:?}"
        );
        raw
    }
}

/// The beginning of a frame of this number of bytes.
pub fn announced(kind: u8, transfer: u32, head: u32, body: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&transfer.to_le_bytes());
    bytes[8..12].copy_from_slice(&head.to_le_bytes());
    bytes[12..16].copy_from_slice(&body.to_le_bytes());
    bytes
}

/// The refusal in an error.
#[track_caller]
pub fn refusal(error: &TransferError) -> Refusal {
    match error {
        TransferError::Refused { refusal, .. } => *refusal,
        other => panic!("not refused: {other}"),
    }
}
