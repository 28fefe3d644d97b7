//! Split files, and folders.

use std::path::PathBuf;

use serde_json::json;

use super::{Written, open, same_bits, widened};

fn split() -> Written {
    Written::called("some-model.gguf", json!({ "type": "Q8_0", "split": 15 }))
}

fn parts(written: &Written) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(written.dir.path()).unwrap().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|it| it == "gguf"));
    files.sort();
    files
}

#[test]
fn any_part_and_the_folder_open_the_whole() {
    let written = split();
    let parts = parts(&written);
    assert!(parts.len() >= 3, "{parts:?}");
    assert!(parts[0].ends_with(format!("some-model-00001-of-{:05}.gguf", parts.len())));
    for path in parts.iter().chain([&written.dir.path().to_owned()]) {
        let (_, checkpoint) = open(path).unwrap();
        assert_eq!(checkpoint.files().count(), parts.len());
        for tensor in checkpoint
            .tensors()
            .filter(|tensor| !tensor.name.ends_with("A_log"))
        {
            same_bits(
                &tensor.name,
                &widened(&tensor),
                &written.expected(&tensor.name),
            );
        }
    }
}

#[test]
fn a_missing_part_is_named() {
    let written = split();
    let parts = parts(&written);
    std::fs::remove_file(&parts[1]).unwrap();
    for path in [&parts[0], &parts[2]] {
        let message = open(path).unwrap_err();
        let name = parts[1].file_name().unwrap().to_str().unwrap();
        assert!(
            message.contains(&format!("1 missing, among them {name}")),
            "{message}"
        );
    }
}

#[test]
fn parts_in_each_others_place_are_refused() {
    let written = split();
    let parts = parts(&written);
    let aside = written.dir.path().join("aside");
    std::fs::rename(&parts[1], &aside).unwrap();
    std::fs::rename(&parts[2], &parts[1]).unwrap();
    std::fs::rename(&aside, &parts[2]).unwrap();
    let message = open(&parts[0]).unwrap_err();
    assert!(
        message.contains("split.no: expected 1, found 2"),
        "{message}"
    );
    let odd = written.dir.path().join("renamed.gguf");
    std::fs::rename(&parts[0], &odd).unwrap();
    let message = open(&odd).unwrap_err();
    assert!(message.contains("-00001-of-"), "{message}");
}

#[test]
fn a_folder_holds_one_model() {
    let written = Written::new(json!({ "type": "Q8_0" }));
    let folder = written.dir.path();
    std::fs::write(folder.join("mmproj-model.gguf"), "no model").unwrap();
    assert!(open(folder).is_ok());
    std::fs::copy(written.file(), folder.join("other.gguf")).unwrap();
    let message = open(folder).unwrap_err();
    assert!(
        message.contains("model.gguf, other.gguf; name one"),
        "{message}"
    );
    std::fs::rename(written.file(), folder.join("blob")).unwrap();
    assert!(
        open(&folder.join("blob")).is_ok(),
        "known by its first bytes"
    );
    let message = open(&folder.join("gone.gguf")).unwrap_err();
    assert!(message.contains("gone.gguf: cannot be read"), "{message}");
}
