//! Every shader is WGSL that naga accepts, in every composition that a pipeline may use. No device is needed.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;

use kimi_linear::backend::wgpu::shaders;
use kimi_linear::checkpoint::FORMATS;
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ValidationFlags, Validator};

/// Capabilities of every WebGPU implementation: `unpack2x16float` counts as one.
const CAPABILITIES: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// Parses and validates one composition, with these values for its overrides.
fn validate(
    name: &str,
    subgroups: bool,
    overrides: &[(&str, u32)],
) -> (naga::Module, naga::valid::ModuleInfo) {
    let what = format!("{name}, subgroups {subgroups}, {overrides:?}");
    let source = shaders::source(name, subgroups).unwrap_or_else(|| panic!("{what}"));
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|error| panic!("{what}:\n{}", error.emit_to_string(&source)));
    let mut capabilities = CAPABILITIES;
    capabilities.set(Capabilities::SUBGROUP, subgroups);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let mut valid = |module: &naga::Module| {
        validator
            .validate(module)
            .unwrap_or_else(|error| panic!("{what}:\n{}", error.emit_to_string(&source)))
    };
    let info = valid(&module);
    let values = overrides.iter();
    let values = values.map(|(name, value)| ((*name).to_owned(), f64::from(*value)));
    let (module, _) = process_overrides(&module, &info, None, &values.collect())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    let module = module.into_owned();
    let info = valid(&module);
    (module, info)
}

#[test]
fn every_shader_is_valid() {
    for name in shaders::names() {
        for subgroups in [false, true] {
            let source = shaders::source(name, subgroups).unwrap();
            // All combinations of weights' formats and caches' dtypes.
            let values = |name: &'static str| -> Vec<Option<(&'static str, u32)>> {
                if !source.contains(&format!("override {name}:")) {
                    return vec![None];
                }
                let ids = FORMATS.iter().map(|format| format.id().unwrap());
                ids.map(|id| Some((name, id))).collect()
            };
            for format in values("FORMAT") {
                for cache in values("CACHE") {
                    let overrides: Vec<_> = format.into_iter().chain(cache).collect();
                    validate(name, subgroups, &overrides);
                }
            }
        }
    }
}

#[test]
fn every_file_is_known_and_used() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut files = BTreeSet::new();
    for (prefix, folder) in [("", folder.clone()), ("shared/", folder.join("shared"))] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if let Some(name) = name.strip_suffix(".wgsl") {
                files.insert(format!("{prefix}{name}"));
            }
        }
    }
    for name in &files {
        assert!(
            shaders::source(name, false).is_some(),
            "{name} is not part of the build"
        );
    }
}

#[test]
fn no_shader_asks_for_more_than_a_browser_has() {
    for name in shaders::names() {
        let (module, info) = validate(name, false, &[]);
        for (i, entry) in module.entry_points.iter().enumerate() {
            let used = |space: fn(naga::AddressSpace) -> bool| {
                module
                    .global_variables
                    .iter()
                    .filter(|(handle, variable)| {
                        space(variable.space) && !info.get_entry_point(i)[*handle].is_empty()
                    })
                    .collect::<Vec<_>>()
            };
            let storage = used(|space| matches!(space, naga::AddressSpace::Storage { .. })).len();
            assert!(
                storage <= 8,
                "{name}: {} binds {storage} storage buffers",
                entry.name
            );
            let mut layouter = naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap();
            let shared: u32 = used(|space| space == naga::AddressSpace::WorkGroup)
                .iter()
                .map(|(_, variable)| layouter[variable.ty].size)
                .sum();
            assert!(
                shared <= 16384,
                "{name}: {} takes {shared} bytes of workgroup memory",
                entry.name
            );
            let threads: u32 = entry.workgroup_size.iter().product();
            assert!(
                threads <= 256,
                "{name}: {} has {threads} threads a workgroup",
                entry.name
            );
        }
    }
}

/// Metal and DX12 use other languages: every composition can be translated to both, without such a device.
#[test]
fn every_shader_translates_for_metal_and_dx12() {
    for name in shaders::names() {
        for subgroups in [false, true] {
            let (module, info) = validate(name, subgroups, &[]);
            let options = naga::back::msl::Options {
                lang_version: (2, 4),
                fake_missing_bindings: true,
                ..Default::default()
            };
            naga::back::msl::write_string(&module, &info, &options, &Default::default())
                .unwrap_or_else(|error| panic!("{name} for Metal: {error}"));
            let options = naga::back::hlsl::Options {
                shader_model: naga::back::hlsl::ShaderModel::V6_0,
                ..Default::default()
            };
            let (mut text, pipeline) = (String::new(), Default::default());
            naga::back::hlsl::Writer::new(&mut text, &options, &pipeline)
                .write(&module, &info, None)
                .unwrap_or_else(|error| panic!("{name} for DX12: {error}"));
        }
    }
}
