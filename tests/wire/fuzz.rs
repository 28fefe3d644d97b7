//! Random bytes that are parsed as frames: each is refused, or is a frame that can be encoded again.

use std::sync::Arc;

use bytes::Bytes;
use kimi_linear::error::Refusal;
use kimi_linear::transfer::frame::{self, Fetch, Frame, HEADER, Header, OPENING};
use proptest::prelude::*;

use crate::peers::identity_of;
use crate::records::{SMALL, header, records};
use crate::seeds::{fuzz_cases, properties};

const MAX_BODY: usize = 1 << 16;

/// Frames as peers send them, one of each kind and two of records.
fn whole() -> Vec<Frame> {
    let all = records(&header(5, 1), &SMALL, 2);
    let record = |index: usize, sequence| Frame::Record {
        sequence,
        record: Arc::new(all[index].clone()),
    };
    let (last, identity) = (all.len() - 1, identity_of(&SMALL));
    vec![
        Frame::Prove {
            proof: [1; 32],
            pool: 2,
            identity: identity.clone(),
        },
        Frame::Welcome {
            proof: [3; 32],
            identity,
        },
        Frame::Refused {
            refusal: Refusal::Busy,
            sentence: "no room".into(),
        },
        Frame::Ping,
        Frame::Fetch(Fetch {
            id: "x".into(),
            caches: 1,
            tokens: 2,
            have: 3,
            window: 4,
            accepted: true,
        }),
        Frame::Accepted,
        record(0, 5),
        record(last, u64::MAX),
        Frame::HandOff {
            records: 6,
            bytes: Bytes::from_static(b"seed and tokens"),
        },
        Frame::Ack { sequence: 7 },
        Frame::Complete,
        Frame::Cancel {
            reason: "ünïcode".into(),
        },
    ]
}

/// Parses bytes as a receiver does, without the checksum, which would reject most of the changed frames.
fn read(bytes: &[u8]) -> Option<(u32, Frame)> {
    let (first, rest) = bytes.split_first_chunk::<HEADER>()?;
    let header = Header::parse(first, MAX_BODY).ok()?;
    assert!(header.head <= frame::MAX_HEAD && header.body <= MAX_BODY);
    let (head, rest) = rest.split_at_checked(header.head)?;
    let body = rest.get(..header.body)?;
    let frame = Frame::decode(&header, head, body.to_vec()).ok()?;
    // A record that was parsed can be checked and refused, for any fields.
    if let Frame::Record { record, .. } = &frame {
        let _ = record.check(record.id);
    }
    Some((header.transfer, frame))
}

fn written(transfer: u32, frame: &Frame) -> Vec<u8> {
    [&frame.encode(transfer)[..], frame.body()].concat()
}

/// A parsed frame is encoded and parsed again to the same frame.
fn read_twice(bytes: &[u8]) {
    if let Some((transfer, frame)) = read(bytes) {
        assert_eq!(read(&written(transfer, &frame)), Some((transfer, frame)));
    }
}

#[test]
fn frames_are_read_as_they_were_written() {
    for frame in whole() {
        let bytes = written(9, &frame);
        let first = bytes.first_chunk().unwrap();
        let header = Header::parse(first, MAX_BODY).unwrap();
        header.check(&bytes[HEADER..][..header.head]).unwrap();
        assert_eq!(read(&bytes), Some((9, frame)));
    }
}

#[test]
fn every_flipped_bit_before_the_body_is_seen() {
    for frame in whole() {
        let bytes = frame.encode(9);
        for bit in 0..8 * bytes.len() {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(header) = Header::parse(bytes.first_chunk().unwrap(), MAX_BODY) else {
                continue;
            };
            let head = &bytes[HEADER..];
            // With a changed length, other bytes are parsed as the head.
            let head = &head[..header.head.min(head.len())];
            assert!(
                header.check(head).is_err(),
                "bit {bit} of {:?}",
                frame.kind()
            );
        }
    }
}

/// Inputs that once found an error, or nearly did: each must be refused.
#[test]
fn kept_inputs_are_refused() {
    let record = whole().swap_remove(6);
    let change = |at: usize, bytes: &[u8]| {
        let mut all = written(1, &record);
        all[HEADER + at..][..bytes.len()].copy_from_slice(bytes);
        all
    };
    // After sequence (8), id (16), checksum (8): tensor, dtype, rank, then layer, heads, positions and the shape.
    let shape = 8 + 16 + 8 + 3 + 5 * 8;
    let huge = (u64::MAX / 2).to_le_bytes();
    let kept = [
        ("tensor 0", change(32, &[0])),
        ("tensor 6", change(32, &[6])),
        ("dtype 4", change(33, &[4])),
        ("another dtype", change(33, &[2])),
        ("rank 5", change(34, &[5])),
        ("a rank beyond the head", change(34, &[3])),
        ("a rank that leaves bytes", change(34, &[1])),
        (
            "a shape whose product overflows",
            change(shape, &[huge, huge].concat()),
        ),
        ("a shape of no bytes", change(shape, &[0; 8])),
        ("a text longer than the head", {
            let mut bytes = Frame::Cancel {
                reason: "ab".into(),
            }
            .encode(1);
            bytes[HEADER] = 200;
            bytes
        }),
        ("a text that is no UTF-8", {
            let mut bytes = Frame::Cancel {
                reason: "ab".into(),
            }
            .encode(1);
            bytes[HEADER + 2] = 0xff;
            bytes
        }),
        ("a flag of 2", {
            let mut bytes = written(1, &whole()[4]);
            bytes[HEADER + 40] = 2;
            bytes
        }),
        ("a refusal of no number", {
            let mut bytes = written(1, &whole()[2]);
            bytes[HEADER..HEADER + 2].copy_from_slice(&[0, 0]);
            bytes
        }),
        ("more properties than a frame has", {
            let mut bytes = written(1, &whole()[1]);
            bytes[HEADER + 32..HEADER + 34].copy_from_slice(&[0xff, 0xff]);
            bytes
        }),
    ];
    for (what, bytes) in kept {
        assert!(read(&bytes).is_none(), "{what} is read");
    }
}

properties! { received, fuzz_cases(500_000),
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(opening) = bytes.first_chunk::<OPENING>() {
            let _ = frame::parse_opening(opening);
        }
        read_twice(&bytes);
    }

    #[test]
    fn changed_frames(
        which in 0..12_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        length in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = FRAMES.with(|frames| frames[which].clone());
        for (at, byte) in changes {
            // Most of them in header and head, which are short.
            let end = bytes.len().min(HEADER + 120);
            bytes[at.index(end)] = byte;
        }
        if let Some(length) = length {
            bytes.truncate(length.index(bytes.len()));
        }
        read_twice(&bytes);
    }

    #[test]
    fn heads_after_a_right_header(kind in 1..12_u8, head in prop::collection::vec(any::<u8>(), 0..150), body in 0..40_usize) {
        let body = if kind == 7 || kind == 8 { body } else { 0 };
        let mut bytes = crate::raw::announced(kind, 1, head.len() as u32, body as u32).to_vec();
        bytes.extend(head);
        bytes.resize(bytes.len() + body, 0);
        read_twice(&bytes);
    }
}

thread_local! {
    static FRAMES: Vec<Vec<u8>> = whole().iter().map(|frame| written(3, frame)).collect();
}
