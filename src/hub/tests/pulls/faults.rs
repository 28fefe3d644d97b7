//! Downloads that are cut, damaged, delayed and changed.

use super::*;

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let place = place(quantised());
    let down = Fault::Status(503, Vec::new());
    place.hub.fail(
        GGUF,
        [Fault::Cut(100_000)]
            .into_iter()
            .chain(std::iter::repeat_n(down, 3)),
    );
    let error = place.pull(REPOSITORY).unwrap_err();
    assert!(
        matches!(&error, HubError::Unreachable { attempts: 4, .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains("status 503")
            && error.to_string().contains("the same command goes on"),
        "{error}"
    );
    assert!(!error.to_string().contains("signature"), "{error}");
    assert_eq!(place.unfinished().len(), 1);
    assert_eq!(place.find(REPOSITORY), None);
    assert!(
        !place.root().join("snapshots").exists(),
        "nothing is visible yet"
    );
    place.hub.asked();
    place.pulls_the_gguf();
    assert_eq!(place.ranges(GGUF), ["bytes=100000-"]);
    assert_eq!(place.hub.sent(GGUF), 300_000, "no byte twice");
}

#[test]
fn whatever_cuts_a_download_does_not_end_it() {
    for faults in [
        vec![
            Fault::Cut(1),
            Fault::Cut(50_000),
            Fault::Cut(0),
            Fault::Cut(100_000),
            Fault::Cut(7),
        ],
        vec![Fault::Stall(70_000), Fault::Cut(10)],
        vec![Fault::Cut(100_000), Fault::Whole],
        vec![Fault::Cut(100_000), Fault::Unsatisfiable],
        vec![Fault::Cut(100_000), Fault::OtherRange],
        vec![
            Fault::Status(429, vec![("Retry-After", "0".to_owned())]),
            Fault::Status(500, Vec::new()),
            Fault::Status(408, Vec::new()),
        ],
        // The address of the second host has expired.
        vec![Fault::Cut(100_000), Fault::Status(403, Vec::new())],
        vec![Fault::Wrong],
        vec![Fault::Cut(1000), Fault::Wrong],
    ] {
        let place = place(quantised());
        place.hub.fail(GGUF, faults.clone());
        let counted = Mutex::new(0);
        let pulled = pull(&place.settings, &name(REPOSITORY), None, &|event| {
            if let Event::Bytes(count) = event {
                *counted.lock().unwrap() += count;
            }
        });
        assert!(
            fs::read(pulled.unwrap().path).unwrap() == quantised()[0].1,
            "{faults:?}"
        );
        assert_eq!(*counted.lock().unwrap(), 300_000, "{faults:?}");
        assert_eq!(place.unfinished(), [""; 0], "{faults:?}");
    }
}

#[test]
fn a_server_that_never_continues_is_given_up() {
    let place = place(quantised());
    place.hub.fail(
        GGUF,
        std::iter::repeat_n([Fault::Cut(1000), Fault::Unsatisfiable], 20).flatten(),
    );
    let error = place.pull(REPOSITORY).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[test]
fn wrong_bytes_are_never_a_blob() {
    let place = place(quantised());
    place.hub.fail(GGUF, [Fault::Wrong, Fault::Wrong]);
    let error = place.pull(REPOSITORY).unwrap_err();
    assert!(
        matches!(&error, HubError::Damaged { expected, .. } if *expected == place.hub.blob(GGUF)),
        "{error}"
    );
    assert_eq!(
        fs::read_dir(place.root().join("blobs")).unwrap().count(),
        0,
        "nothing is kept"
    );
    place.pulls_the_gguf();

    let checkpoint = self::place(checkpoint());
    checkpoint
        .hub
        .fail("config.json", [Fault::Wrong, Fault::Wrong]);
    let error = checkpoint.pull(REPOSITORY).unwrap_err();
    assert!(
        matches!(&error, HubError::Damaged { file, .. } if file == "config.json"),
        "small files have hashes too: {error}"
    );
    assert_eq!(checkpoint.find(REPOSITORY), None);
}

#[test]
fn what_an_earlier_download_left_is_checked() {
    let place = place(quantised());
    let blobs = place.root().join("blobs");
    let left = blobs.join(format!("{}.incomplete", place.hub.blob(GGUF)));
    fs::create_dir_all(&blobs).unwrap();
    let content = &quantised()[0].1;
    let damaged: Vec<u8> = content[..200_000].iter().map(|byte| byte ^ 1).collect();
    let longer = [content.as_slice(), b"x"].concat();
    for there in [
        damaged.as_slice(),
        &longer,
        content,
        &content[..299_999],
        b"",
    ] {
        fs::write(&left, there).unwrap();
        let _ = fs::remove_file(blobs.join(place.hub.blob(GGUF)));
        place.pulls_the_gguf();
    }
}

#[test]
fn a_file_that_changes_at_the_hub_is_not_mixed() {
    let place = place(quantised());
    place.hub.fail(GGUF, [Fault::Etag("0".repeat(64))]);
    let error = place.pull(REPOSITORY).unwrap_err();
    assert!(matches!(&error, HubError::Changed { .. }), "{error}");
    place
        .hub
        .fail(GGUF, [Fault::Etag("an-etag-of-another-kind".to_owned())]);
    place.pulls_the_gguf();

    let checkpoint = self::place(checkpoint());
    checkpoint
        .hub
        .fail("config.json", [Fault::Etag("0".repeat(40))]);
    assert!(matches!(
        checkpoint.pull(REPOSITORY),
        Err(HubError::Changed { .. })
    ));
    checkpoint.pull(REPOSITORY).unwrap();
}

#[test]
fn the_hub_may_ask_to_wait() {
    let place = place(quantised());
    place.hub.fail(
        "api",
        [
            Fault::Status(429, vec![("Retry-After", "1".to_owned())]),
            Fault::Status(502, Vec::new()),
        ],
    );
    let waits = Mutex::new(Vec::new());
    let pulled = pull(&place.settings, &name(REPOSITORY), None, &|event| {
        if let Event::Again { wait, .. } = event {
            waits.lock().unwrap().push(wait);
        }
    });
    pulled.unwrap();
    assert_eq!(
        *waits.lock().unwrap(),
        [Duration::from_secs(1), Duration::from_millis(4)]
    );
    place.hub.fail(
        "api",
        [Fault::Status(429, vec![("Retry-After", "3600".to_owned())])],
    );
    let error = place.pull(REPOSITORY).unwrap_err().to_string();
    assert!(error.contains("429 and asks to wait 60 minutes"), "{error}");
}
