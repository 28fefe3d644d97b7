//! Snapshots: they are restored to the bit, and mismatches are refused with both values.

use crate::engine_harness::{OPTIONS, answer, engine, limits, request, tokens};
use kimi_linear::backend::{Orientation, StateRecord};
use kimi_linear::cache::{SNAPSHOT_VERSION, Snapshot};
use kimi_linear::engine::{Engine, EngineOptions};
use pollster::block_on;

fn small(name: &str) -> Engine {
    engine(name, limits(1, 4, 16), OPTIONS)
}

/// A snapshot after a prompt of 38 tokens, and the prompt that continues from it.
fn taken(engine: &mut Engine) -> (Snapshot, Vec<u32>) {
    let prompt = tokens(1, 38);
    let _ = answer(engine, request(prompt.clone(), 0));
    let mut snapshot = block_on(engine.snapshot(&prompt)).unwrap();
    snapshot.note = "a note, naïve".to_owned();
    assert_eq!(snapshot.tokens, prompt);
    (snapshot, [prompt, tokens(2, 9)].concat())
}

#[test]
fn a_snapshot_goes_on_elsewhere_bit_for_bit() {
    for name in ["tiny-a", "tiny-128"] {
        let mut first = small(name);
        let (snapshot, longer) = taken(&mut first);
        let expected = answer(&mut first, request(longer.clone(), 10));
        assert_eq!(expected.usage.cached_tokens, 38);
        let read = Snapshot::from_bytes(&snapshot.to_bytes().unwrap()).unwrap();
        assert_eq!(read, snapshot);
        // States in the other orientation have the same meaning.
        let transposed = |record: &StateRecord| {
            let (k, v) = (record.key_width, record.value_width);
            let place = |i: usize| (i / (k * v), i / k % v, i % k);
            let state = (0..record.state.len())
                .map(place)
                .map(|(h, e, d)| record.state[(h * k + d) * v + e]);
            StateRecord {
                orientation: Orientation::ValueKey,
                state: state.collect(),
                ..record.clone()
            }
        };
        let turned = Snapshot {
            states: read.states.iter().map(transposed).collect(),
            ..read.clone()
        };
        for snapshot in [read, turned] {
            let mut second = small(name);
            second.restore(snapshot).unwrap();
            let found = answer(&mut second, request(longer.clone(), 10));
            assert_eq!(found, expected, "{name}");
        }
    }
}

#[test]
fn a_file_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.kl");
    let (snapshot, _) = taken(&mut small("tiny-a"));
    snapshot.save(&path).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap(), snapshot);
    snapshot.save(&path).unwrap();
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
    let nowhere = folder.path().join("no folder").join("chat.kl");
    let error = snapshot.save(&nowhere).unwrap_err().to_string();
    assert!(error.ends_with("cannot write the snapshot"), "{error}");
    let error = Snapshot::load(&nowhere).unwrap_err().to_string();
    assert!(error.ends_with("cannot read the snapshot"), "{error}");
    std::fs::write(&path, &snapshot.to_bytes().unwrap()[..1000]).unwrap();
    let error = Snapshot::load(&path).unwrap_err().to_string();
    assert!(
        error.contains("chat.kl: the snapshot is cut off or too long: it should have "),
        "{error}"
    );
}

#[test]
fn what_is_cut_off_or_damaged_is_refused() {
    let (snapshot, _) = taken(&mut small("tiny-a"));
    let bytes = snapshot.to_bytes().unwrap();
    for end in (0..bytes.len()).step_by(997).chain([bytes.len() - 1]) {
        let error = Snapshot::from_bytes(&bytes[..end]).unwrap_err().to_string();
        assert!(
            error.starts_with("the snapshot is cut off or too long: it should have ")
                && error.ends_with(&format!(", but has {end}")),
            "{error}"
        );
    }
    // One bit at a time: every bit of the header, then samples.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in (0..header).chain((header..bytes.len()).step_by(1511)) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(Snapshot::from_bytes(&damaged).is_err(), "byte {at}");
    }
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 4;
    let error = Snapshot::from_bytes(&damaged).unwrap_err().to_string();
    assert!(
        error.contains("is damaged: its checksum should be ") && error.contains(", but is "),
        "{error}"
    );
    let mut longer = bytes.clone();
    longer.push(0);
    let error = Snapshot::from_bytes(&longer).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "the snapshot is cut off or too long: it should have {} bytes, but has {}",
            bytes.len(),
            longer.len()
        )
    );
    let error = Snapshot::from_bytes(b"{\"messages\": [], \"tokens\": 3}")
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "not a snapshot: its format should be \"kimi-linear snapshot\", but is \"{\\\"messages\\\": [],\""
    );
}

/// The file with one text of its metadata changed.
fn changed(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(&bytes[8..header]).unwrap();
    assert_eq!(text.matches(from).count(), 1, "{text}");
    let text = text.replace(from, to);
    let length = (text.len() as u64).to_le_bytes();
    [&length, text.as_bytes(), &bytes[header..]].concat()
}

#[test]
fn other_versions_are_refused() {
    let (snapshot, _) = taken(&mut small("tiny-a"));
    let bytes = snapshot.to_bytes().unwrap();
    let own = format!("\"version\":\"{SNAPSHOT_VERSION}\"");
    let error = Snapshot::from_bytes(&changed(&bytes, &own, "\"version\":\"3\""));
    assert_eq!(
        error.unwrap_err().to_string(),
        "the snapshot is of format version 3, but this build reads version 2"
    );
    // Files of an earlier format, from before safetensors.
    let old = [&b"KLRECORD"[..], &1_u32.to_le_bytes(), &[0; 100]].concat();
    let error = Snapshot::from_bytes(&old).unwrap_err().to_string();
    assert_eq!(
        error,
        "the snapshot is of format version 1, but this build reads version 2"
    );
}

#[test]
fn another_model_or_layout_is_refused_with_both_values() {
    let mut own = small("tiny-a");
    let mut other = small("tiny-128");
    let (snapshot, _) = taken(&mut own);
    let (foreign, _) = taken(&mut other);
    let error = own.restore(foreign.clone()).unwrap_err().to_string();
    let expected = format!(
        "the snapshot's model should be {}, but is {}",
        snapshot.model, foreign.model
    );
    assert_eq!(error, expected);
    // The fingerprint of one model with the memory of another.
    let error = own
        .restore(Snapshot {
            model: snapshot.model,
            ..foreign
        })
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("the snapshot's "), "{error}");
    let mut fewer = snapshot.clone();
    fewer.states.pop();
    let error = own.restore(fewer).unwrap_err().to_string();
    assert_eq!(
        error,
        "the snapshot's number of KDA layers should be 4, but is 3"
    );
    let mut wider = snapshot.clone();
    wider.states[1].key_width = 64;
    let error = own.restore(wider).unwrap_err().to_string();
    assert_eq!(
        error,
        "the snapshot's state of KDA layer 1 (heads, K, V) should be [2, 32, 32], but is [2, 64, 32]"
    );
    let mut shorter = snapshot.clone();
    shorter.latents[0].rows.truncate(4 * 64);
    let error = own.restore(shorter).unwrap_err().to_string();
    assert_eq!(
        error,
        "the snapshot's elements of the latents of MLA layer 0 should be 2432, but is 64"
    );
    // The layers of one snapshot with the identity of another.
    let bytes = snapshot.to_bytes().unwrap();
    let renamed = changed(
        &bytes,
        &format!("\"model\":\"{}\"", snapshot.model),
        &format!("\"model\":\"{}\"", "0123456789abcdef0123456789abcdef"),
    );
    let error = Snapshot::from_bytes(&renamed).unwrap_err().to_string();
    assert!(error.contains(" is damaged: its checksum "), "{error}");
}

#[test]
fn a_snapshot_larger_than_host_memory_is_refused() {
    let (snapshot, _) = taken(&mut small("tiny-a"));
    let options = EngineOptions {
        host_bytes: 1000,
        ..OPTIONS
    };
    let error = engine("tiny-a", limits(1, 4, 16), options)
        .restore(snapshot)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("bytes of host memory, but only 1000 may be used"),
        "{error}"
    );
}

#[test]
fn without_a_checkpoint_there_is_no_snapshot() {
    let error = block_on(small("tiny-a").snapshot(&[1, 2, 3]))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "no checkpoint is cached within these 3 tokens");
}

/// Python opens a snapshot and plots a head's state.
#[test]
fn python_plots_a_head() {
    let folder = tempfile::tempdir().unwrap();
    let (path, plot) = (
        folder.path().join("chat.kl"),
        folder.path().join("head.png"),
    );
    let (snapshot, _) = taken(&mut small("tiny-a"));
    snapshot.save(&path).unwrap();
    let output = std::process::Command::new(crate::python::interpreter())
        .arg("examples/plot_snapshot.py")
        .args([path.as_os_str(), plot.as_os_str()])
        .args(["1", "0"])
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    // It prints what it read: the same numbers.
    let head = &snapshot.states[1].key_value()[..32 * 32];
    let norm = head
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        .sqrt();
    assert_eq!(
        stdout.trim(),
        format!("38 tokens, 32 x 32, norm {norm:.4}"),
        "{stderr}"
    );
    assert!(std::fs::metadata(&plot).unwrap().len() > 1000);
}
