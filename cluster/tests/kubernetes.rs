//! The manifests in `kubernetes/` against Kubernetes' own schema, as `k8s-openapi` has it, and against the programs' flags.
//!
//! Kubernetes' types ignore fields that they do not know. So each document is read as its type and written again: what is missing then
//! was not known, such as a misspelt field.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A kustomization, with the fields that are used here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Kustomization {
    api_version: String,
    kind: String,
    #[serde(default)]
    namespace: Option<String>,
    resources: Vec<String>,
    #[serde(default)]
    patches: Vec<Patch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    target: Target,
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes")
}

fn documents(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| {
            Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        })
        .collect()
}

/// All documents of a kustomization, with its patches applied, by kind and name.
fn built(name: &str) -> BTreeMap<(String, String), Value> {
    let folder = folder().join(name);
    let [found] = &documents(&folder.join("kustomization.yaml"))[..] else {
        panic!("{name}: a kustomization is one document");
    };
    let this: Kustomization = serde_json::from_value(found.clone()).unwrap();
    assert_eq!(this.api_version, "kustomize.config.k8s.io/v1beta1");
    assert_eq!(this.kind, "Kustomization");
    assert!(
        this.namespace
            .is_none_or(|namespace| namespace == "kimi-linear")
    );
    let mut all = BTreeMap::new();
    for resource in &this.resources {
        let found = match resource.strip_prefix("../") {
            Some(other) => built(other).into_values().collect(),
            None => documents(&folder.join(resource)),
        };
        for document in found {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let key = (text(&document["kind"]), text(&document["metadata"]["name"]));
            assert!(all.insert(key, document).is_none(), "{resource} twice");
        }
    }
    for patch in &this.patches {
        let [operations] = &documents(&folder.join(&patch.path))[..] else {
            panic!("{}: a patch is one document", patch.path);
        };
        let operations: json_patch::Patch = serde_json::from_value(operations.clone()).unwrap();
        let names: Vec<&str> = patch.target.name.split('|').collect();
        let mut patched = 0;
        for ((kind, name), document) in &mut all {
            if *kind == patch.target.kind && names.contains(&name.as_str()) {
                json_patch::patch(document, &operations).unwrap();
                patched += 1;
            }
        }
        assert_eq!(patched, names.len(), "{}", patch.path);
    }
    all
}

/// Reads a document as a type and fails if it has a field that the type does not have.
fn strictly<T: DeserializeOwned + Serialize>(document: &Value) -> T {
    let typed: T = serde_json::from_value(document.clone())
        .unwrap_or_else(|error| panic!("{error}: {document:#}"));
    let again = serde_json::to_value(&typed).unwrap();
    assert_kept("", document, &again);
    typed
}

fn assert_kept(path: &str, before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (name, value) in before {
                let path = format!("{path}/{name}");
                let kept = after.get(name);
                let kept = kept.unwrap_or_else(|| panic!("{path} is no field of this kind"));
                assert_kept(&path, value, kept);
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            assert_eq!(before.len(), after.len(), "{path}");
            for (index, (before, after)) in before.iter().zip(after).enumerate() {
                assert_kept(&format!("{path}/{index}"), before, after);
            }
        }
        _ => assert_eq!(before, after, "{path}"),
    }
}

fn check(document: &Value) {
    let kind = document["kind"].as_str().unwrap();
    let version = document["apiVersion"].as_str().unwrap();
    match (version, kind) {
        ("v1", "Namespace") => drop(strictly::<Namespace>(document)),
        ("v1", "PersistentVolumeClaim") => drop(strictly::<PersistentVolumeClaim>(document)),
        ("v1", "Service") => drop(strictly::<Service>(document)),
        ("apps/v1", "StatefulSet") => drop(strictly::<StatefulSet>(document)),
        ("apps/v1", "Deployment") => {
            let deployment: Deployment = strictly(document);
            let spec = deployment.spec.unwrap();
            let labels = spec.template.metadata.unwrap().labels;
            assert_eq!(spec.selector.match_labels, labels);
        }
        ("networking.k8s.io/v1", "NetworkPolicy") => drop(strictly::<NetworkPolicy>(document)),
        other => panic!("{other:?} is not checked"),
    }
}

#[test]
fn every_document_is_of_its_kind_to_the_last_field() {
    for name in ["local", "prfaas", "gpu", "host-network"] {
        let all = built(name);
        assert!(!all.is_empty());
        all.values().for_each(check);
    }
    // Each file is part of a kustomization.
    let local = std::fs::read_dir(folder().join("local")).unwrap();
    let files: Vec<String> = local
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "kustomization.yaml")
        .collect();
    let text = std::fs::read_to_string(folder().join("local/kustomization.yaml")).unwrap();
    for file in files {
        assert!(text.contains(&file), "{file}");
    }
}

#[test]
#[should_panic(expected = "/spec/replica is no field of this kind")]
fn a_misspelt_field_is_found() {
    let mut document = built("local")
        .remove(&("Deployment".into(), "decode".into()))
        .unwrap();
    document["spec"]["replica"] = Value::from(2);
    check(&document);
}

/// The command of a deployment's container.
fn command(document: &Value) -> Vec<&str> {
    let container = &document["spec"]["template"]["spec"]["containers"][0];
    let command = container["command"].as_array().unwrap();
    command.iter().map(|word| word.as_str().unwrap()).collect()
}

#[test]
fn the_programs_have_every_flag_that_is_used() {
    let programs = [
        (
            "kimi-linear-worker",
            env!("CARGO_BIN_EXE_kimi-linear-worker"),
        ),
        (
            "kimi-linear-frontend",
            env!("CARGO_BIN_EXE_kimi-linear-frontend"),
        ),
    ];
    for name in ["local", "gpu"] {
        for ((kind, name), document) in built(name) {
            if kind != "Deployment" {
                continue;
            }
            let command = command(&document);
            let (_, path) = programs
                .iter()
                .find(|(program, _)| *program == command[0])
                .unwrap_or_else(|| panic!("{name} runs {}", command[0]));
            let output = Command::new(path).arg("--help").output().unwrap();
            let help = String::from_utf8(output.stdout).unwrap();
            for word in &command[1..] {
                let flag = word.split('=').next().unwrap();
                let known = help
                    .split_whitespace()
                    .any(|word| word.trim_end_matches(',') == flag);
                assert!(known, "{name}: {flag} is no flag of {}", command[0]);
            }
        }
    }
}

#[test]
fn patches_change_what_they_say() {
    let all = built("gpu");
    for name in ["prefill", "decode", "prfaas"] {
        let document = &all[&("Deployment".to_owned(), name.to_owned())];
        let command = command(document);
        assert!(command.contains(&"--backend=cuda"), "{command:?}");
        let role = format!("--role={name}");
        assert!(command.contains(&&*role), "{command:?}");
        for flag in ["--backend=", "--max-num-seqs=", "--max-model-len="] {
            let count = command.iter().filter(|word| word.starts_with(flag)).count();
            assert_eq!(count, 1, "{command:?}");
        }
        let container = &document["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["resources"]["limits"]["nvidia.com/gpu"], "1");
    }
    let all = built("host-network");
    let pod = &all[&("Deployment".to_owned(), "prfaas".to_owned())]["spec"]["template"]["spec"];
    assert_eq!(pod["hostNetwork"], true);
}
