use super::*;

/// Flags as if none was given, with discovery in a folder of the test.
fn flags(folder: &std::path::Path) -> NetworkFlags {
    NetworkFlags {
        discovery: Some(Discovery::File(folder.to_owned())),
        host: None,
        system_port: None,
        namespace: "kimi-linear".to_owned(),
        grace_period: None,
    }
}

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!(
        "kimi-linear-settings-{name}-{}",
        std::process::id()
    ))
}

fn resolve(flags: &NetworkFlags, variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    let env = |name: &str| {
        let found = variables.iter().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    Settings::of(flags, Program::Worker, &env)
}

fn said(flags: &NetworkFlags, variables: &[(&str, &str)]) -> String {
    match resolve(flags, variables) {
        Ok(settings) => panic!("{variables:?} was taken: {settings:?}"),
        Err(error) => error.to_string(),
    }
}

fn value<'a>(settings: &'a Settings, name: &str) -> Option<&'a str> {
    let variables = settings.variables().iter();
    let mut found = variables.filter(|(variable, _)| *variable == name);
    let value = found.next().map(|(_, value)| value.as_str());
    assert!(found.next().is_none(), "{name} is set twice");
    value
}

#[test]
fn one_machine_needs_no_setting() {
    let folder = folder("defaults");
    let settings = resolve(&flags(&folder), &[]).unwrap();
    for host in HOSTS {
        assert_eq!(value(&settings, host), Some("127.0.0.1"));
    }
    let expected = [
        ("DYN_DISCOVERY_BACKEND", "file"),
        ("DYN_FILE_KV", folder.to_str().unwrap()),
        ("DYN_REQUEST_PLANE", "tcp"),
        ("DYN_EVENT_PLANE", "zmq"),
        ("DYN_SELF_HOST_METADATA", "0"),
        ("DYN_SYSTEM_HOST", "127.0.0.1"),
        ("DYN_SYSTEM_PORT", "0"),
        ("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "1"),
    ];
    for (name, expected) in expected {
        assert_eq!(value(&settings, name), Some(expected), "{name}");
    }
    assert!(settings.system_server);
    let none = |_: &str| None;
    let frontend = Settings::of(&flags(&folder), Program::Frontend, &none).unwrap();
    assert!(!frontend.system_server);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_flag_wins_over_its_variable_and_a_variable_over_the_default() {
    let folder = folder("order");
    let variables = [
        ("DYN_SELF_HOST_METADATA", "1"),
        ("DYN_LOG", "debug"),
        ("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.5"),
        ("DYN_TCP_RPC_HOST", "192.0.2.1"),
    ];
    let given = NetworkFlags {
        host: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        ..flags(&folder)
    };
    let settings = resolve(&given, &variables).unwrap();
    assert_eq!(value(&settings, "DYN_TCP_RPC_HOST"), Some("127.0.0.1"));
    // A variable that is set is left as it is.
    assert_eq!(value(&settings, "DYN_SELF_HOST_METADATA"), None);
    assert_eq!(value(&settings, "DYN_LOG"), None);
    assert_eq!(settings.grace_period, Duration::from_millis(500));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn addresses_that_make_a_client_wait_for_ever_are_refused() {
    let folder = folder("hosts");
    let etcd = |urls: &str| NetworkFlags {
        discovery: Some(Discovery::parse(urls).unwrap()),
        ..flags(&folder)
    };
    let remote = etcd("etcd:http://192.0.2.1:2379");
    let missing = said(&remote, &[]);
    assert!(missing.contains("--dyn-host is missing"), "{missing}");
    let loopback = said(&remote, &[("DYN_TCP_RESPONSE_STREAM_HOST", "127.0.0.1")]);
    assert!(
        loopback.contains("cannot be reached from other machines"),
        "{loopback}"
    );
    // 192.0.2.0/24 is for documentation: no machine has it.
    let elsewhere = said(&flags(&folder), &[("DYN_EVENT_PLANE_HOST", "192.0.2.1")]);
    assert!(
        elsewhere.contains("is no address of this machine"),
        "{elsewhere}"
    );
    let every = said(&flags(&folder), &[("DYN_TCP_RPC_HOST", "0.0.0.0")]);
    assert!(every.contains("means every address"), "{every}");
    let name = said(&flags(&folder), &[("DYN_TCP_RPC_HOST", "eth0")]);
    assert!(name.contains("should be an IP address"), "{name}");
    // etcd on this machine is no other machine.
    let local = resolve(&etcd("etcd:http://localhost:2379,http://[::1]:2379"), &[]).unwrap();
    assert_eq!(local.host, IpAddr::V4(Ipv4Addr::LOCALHOST));
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn discovery_is_read_from_flags_and_variables() {
    assert!(Discovery::parse("consul:x").is_err());
    assert!(Discovery::parse("file:").is_err());
    let folder = folder("discovery");
    let none = NetworkFlags {
        discovery: None,
        ..flags(&folder)
    };
    let path = folder.to_str().unwrap();
    let settings = resolve(&none, &[("DYN_FILE_KV", path)]).unwrap();
    assert_eq!(settings.discovery, Discovery::File(folder.clone()));
    let memory = said(&none, &[("DYN_DISCOVERY_BACKEND", "mem")]);
    assert!(memory.contains("file, etcd or kubernetes"), "{memory}");
    let pod = said(&none, &[("DYN_DISCOVERY_BACKEND", "kubernetes")]);
    assert!(pod.contains("POD_NAME"), "{pod}");
    for url in [
        "localhost:2379",
        "http://localhost",
        "http://:2379",
        "http://h:x",
    ] {
        let endpoints = [("DYN_DISCOVERY_BACKEND", "etcd"), ("ETCD_ENDPOINTS", url)];
        let error = said(&none, &endpoints);
        assert!(error.contains("http://HOST:PORT"), "{error}");
    }
    let file = folder.join("file");
    std::fs::write(&file, "x").unwrap();
    let error = said(&flags(&file.join("below")), &[]);
    assert!(error.contains("cannot write to"), "{error}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn numbers_and_names_have_their_range() {
    let folder = folder("numbers");
    let port = said(&flags(&folder), &[("DYN_SYSTEM_PORT", "40000")]);
    assert!(port.contains("up to 32767"), "{port}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port();
    // The system hands out ports above that limit, too.
    if i64::from(taken_port) <= HIGHEST_PORT {
        let error = said(
            &flags(&folder),
            &[("DYN_SYSTEM_PORT", &taken_port.to_string())],
        );
        assert!(error.contains("choose another --system-port"), "{error}");
    }
    let none = resolve(&flags(&folder), &[("DYN_SYSTEM_PORT", "-1")]).unwrap();
    assert!(!none.system_server);
    for grace in ["-1", "NaN", "soon"] {
        let error = said(&flags(&folder), &[(GRACE_PERIOD, grace)]);
        assert!(error.contains("seconds from 0 to 3600"), "{error}");
    }
    let plane = said(&flags(&folder), &[("DYN_RESPONSE_PLANE", "http")]);
    assert!(plane.contains("tcp or quic"), "{plane}");
    let nats = said(&flags(&folder), &[("DYN_EVENT_PLANE", "nats")]);
    assert!(nats.contains("NATS_SERVER is missing"), "{nats}");
    let named = NetworkFlags {
        namespace: "Kimi Linear".to_owned(),
        ..flags(&folder)
    };
    assert!(said(&named, &[]).contains("small letters"));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn files_of_tls_are_looked_at() {
    let folder = folder("tls");
    let half = said(
        &flags(&folder),
        &[("DYN_TCP_TLS_CERT_PATH", "/nonexistent")],
    );
    assert!(half.contains("DYN_TCP_TLS_KEY_PATH is missing"), "{half}");
    let gone = said(
        &flags(&folder),
        &[("DYN_TCP_TLS_CA_CERT_PATH", "/nonexistent")],
    );
    assert!(gone.contains("cannot read /nonexistent"), "{gone}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn etcds_certificates_are_texts() {
    let flags = flags(&folder("pem"));
    let said = said(&flags, &[("ETCD_AUTH_CA", "tls/ca.crt")]);
    assert!(
        said.contains("ETCD_AUTH_CA") && said.contains("PEM"),
        "{said}"
    );
    let text = "-----BEGIN CERTIFICATE-----\n";
    assert!(resolve(&flags, &[("ETCD_AUTH_CA", text)]).is_ok());
}

#[test]
fn the_environment_of_a_running_program_is_left_alone() {
    let folder = folder("threads");
    let settings = resolve(&flags(&folder), &[]).unwrap();
    // The test harness has threads.
    let error = settings.apply().unwrap_err().to_string();
    assert!(
        error.contains("before the program starts threads"),
        "{error}"
    );
    std::fs::remove_dir_all(folder).unwrap();
}
