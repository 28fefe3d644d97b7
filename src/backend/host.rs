//! Facts about the machine that the program runs on; a browser reports none.

/// The memory in bytes that the program may use: the machine's, or less if its control groups have a limit.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn memory() -> Option<u64> {
    let kinds = sysinfo::RefreshKind::nothing()
        .with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let system = sysinfo::System::new_with_specifics(kinds).ok();
    let machine = system.map(|system| system.total_memory());
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = cgroup_limit(std::path::Path::new("/sys/fs/cgroup"), &groups);
    machine.into_iter().chain(limit).min()
}

/// The memory in bytes that the program may use.
#[cfg(target_arch = "wasm32")]
pub(super) fn memory() -> Option<u64> {
    None
}

/// The smallest memory limit of the control groups that `/proc/self/cgroup` lists, and of their parents; `root` is the folder
/// of their files. A line is `NUMBER:CONTROLLERS:PATH`; version 2 has number 0 and no controllers.
#[cfg(not(target_arch = "wasm32"))]
fn cgroup_limit(root: &std::path::Path, groups: &str) -> Option<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (folder, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            some if some.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let path = std::path::Path::new(path.trim_start_matches('/'));
        for group in path.ancestors() {
            let limit = std::fs::read_to_string(folder.join(group).join(file)).ok();
            // `max` means no limit.
            limits.extend(limit.and_then(|limit| limit.trim().parse::<u64>().ok()));
        }
    }
    limits.into_iter().min()
}

/// The CPU's name, or its architecture.
pub(super) fn cpu() -> String {
    brand().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(not(target_arch = "wasm32"))]
fn brand() -> Option<String> {
    let kinds = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
    let system = sysinfo::System::new_with_specifics(kinds).ok()?;
    let brand = system.cpus().first()?.brand().trim();
    (!brand.is_empty()).then(|| brand.to_owned())
}

#[cfg(target_arch = "wasm32")]
fn brand() -> Option<String> {
    None
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use super::*;

    #[test]
    fn limits_of_control_groups_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("memory.max", "max\n");
        write("a/memory.max", "4096\n");
        write("a/b/memory.max", "max\n");
        write("memory/c/memory.limit_in_bytes", "2048\n");
        for (groups, expected) in [
            ("0::/\n", None),
            ("0::/a/b\n", Some(4096)),
            ("0::/../elsewhere\n", None),
            ("12:cpu,memory:/c\n1:name=systemd:/a\n0::/\n", Some(2048)),
            ("12:memory:/c/d\n0::/a\n", Some(2048)),
            ("", None),
            ("nonsense", None),
        ] {
            assert_eq!(cgroup_limit(root, groups), expected, "{groups:?}");
        }
    }
}
