//! Copies of the reference checkpoints that tests may damage, and safetensors files in parts that can be changed and written
//! again.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A reference checkpoint.
pub(crate) fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name)
}

/// A copy of a reference checkpoint, deleted when dropped.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn copy(name: &str) -> Dir {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(reference(name)).unwrap() {
            let entry = entry.unwrap();
            let file = entry.file_name();
            let wanted = file.to_str().unwrap();
            if wanted.starts_with("model") || wanted == "config.json" {
                std::fs::copy(entry.path(), dir.path().join(file)).unwrap();
            }
        }
        Dir(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path().join(file)).unwrap()
    }

    pub(crate) fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.path().join(file), bytes).unwrap();
    }

    pub(crate) fn delete(&self, file: &str) {
        std::fs::remove_file(self.path().join(file)).unwrap();
    }

    pub(crate) fn shard(&self, file: &str) -> Shard {
        Shard::parse(&self.read(file))
    }

    pub(crate) fn put(&self, file: &str, shard: &Shard) {
        self.write(file, &shard.serialize());
    }

    /// Sets a field of config.json.
    pub(crate) fn configure(&self, field: &str, value: Value) {
        let mut config: Value = serde_json::from_slice(&self.read("config.json")).unwrap();
        config[field] = value;
        self.write("config.json", config.to_string().as_bytes());
    }

    /// Changes the index's map.
    pub(crate) fn edit_index(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let name = "model.safetensors.index.json";
        let mut index: Value = serde_json::from_slice(&self.read(name)).unwrap();
        edit(index["weight_map"].as_object_mut().unwrap());
        self.write(name, index.to_string().as_bytes());
    }

    /// Writes the index again from the shards.
    pub(crate) fn reindex(&self) {
        let mut files: Vec<String> = std::fs::read_dir(self.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.ends_with(".safetensors"))
            .collect();
        files.sort();
        self.edit_index(|map| {
            map.clear();
            for file in &files {
                for (name, ..) in self.shard(file).tensors {
                    map.insert(name, json!(file));
                }
            }
        });
    }
}

/// A safetensors file in parts: name, dtype, shape, bytes.
pub(crate) struct Shard {
    pub(crate) tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
    /// Spaces added to the header, in addition to those that align it.
    pub(crate) padding: usize,
}

impl Shard {
    fn parse(file: &[u8]) -> Shard {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let data = &file[8 + length..];
        let entries = header
            .into_iter()
            .filter(|(name, _)| name != "__metadata__");
        let tensors = entries
            .map(|(name, entry)| {
                let numbers = |key: &str| -> Vec<usize> {
                    serde_json::from_value(entry[key].clone()).unwrap()
                };
                let (shape, at) = (numbers("shape"), numbers("data_offsets"));
                (
                    name,
                    entry["dtype"].as_str().unwrap().to_owned(),
                    shape,
                    data[at[0]..at[1]].to_vec(),
                )
            })
            .collect();
        Shard {
            tensors,
            padding: 0,
        }
    }

    fn serialize(&self) -> Vec<u8> {
        let mut header = Map::new();
        let mut data = Vec::new();
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        // The widest dtype first, as the format's own writer does, so that all are aligned.
        tensors.sort_by_key(|(_, dtype, ..)| !dtype.ends_with("32"));
        for (name, dtype, shape, bytes) in tensors {
            let at = data.len();
            data.extend_from_slice(bytes);
            header.insert(
                name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [at, data.len()]}),
            );
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8) + self.padding, b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        file
    }

    fn place(&self, name: &str) -> usize {
        self.tensors.iter().position(|t| t.0 == name).expect(name)
    }

    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        &self.tensors[self.place(name)].3
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        let place = self.place(from);
        self.tensors[place].0 = to.to_owned();
    }

    pub(crate) fn reshape(&mut self, name: &str, shape: &[usize]) {
        let place = self.place(name);
        self.tensors[place].2 = shape.to_vec();
    }

    pub(crate) fn remove(&mut self, name: &str) {
        let place = self.place(name);
        self.tensors.remove(place);
    }

    /// Replaces a tensor, or adds it.
    pub(crate) fn set(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) {
        let tensor = (name.to_owned(), dtype.to_owned(), shape.to_vec(), bytes);
        match self.tensors.iter().position(|t| t.0 == name) {
            Some(place) => self.tensors[place] = tensor,
            None => self.tensors.push(tensor),
        }
    }
}
