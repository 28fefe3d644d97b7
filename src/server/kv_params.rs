//! `kv_transfer_params` of a request, with vLLM's names: whether its prompt's caches are exported, imported, or neither.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::fields::Fields;
use crate::connector::Connector;

/// Maximum length of a transfer's name in bytes.
const LONGEST_ID: usize = 256;

/// The transfer of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Remote {
    /// The prompt is prefilled here and answered elsewhere; without a name the transfer gets one.
    Decode { id: Option<String> },
    /// The prompt is prefilled elsewhere; without an address by the producer in the server's configuration.
    Prefill {
        id: String,
        address: Option<(String, u16)>,
    },
}

/// The fields as they stand in a body. Those that other connectors send and that change nothing here are taken and not read.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "KvTransferParams")]
struct Fielded {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    transfer_id: Option<String>,
    remote_host: Option<String>,
    remote_port: Option<u16>,
    #[serde(rename = "remote_engine_id")]
    _engine_id: Option<Value>,
    #[serde(rename = "remote_block_ids")]
    _block_ids: Option<Value>,
    #[serde(rename = "remote_request_id")]
    _request_id: Option<Value>,
    #[serde(rename = "tp_size")]
    _tp_size: Option<Value>,
    #[serde(rename = "remote_tp_size")]
    _remote_tp_size: Option<Value>,
}

const NAME: &str = "kv_transfer_params";

/// The field of chats and completions.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "KvTransfer")]
pub(super) struct KvFields {
    kv_transfer_params: Option<Fielded>,
}

/// Takes the field; `None` where the request is answered here alone.
pub(super) fn take(fields: &mut Fields) -> Result<Option<Remote>> {
    let found: KvFields = fields.part()?;
    let found = found.kv_transfer_params.unwrap_or_default();
    let refused = |name: &str, message: &str| {
        Err(ApiError::field(&format!("{NAME}.{name}"), message).code("invalid_value"))
    };
    if let Some(id) = &found.transfer_id
        && !(1..=LONGEST_ID).contains(&id.len())
    {
        let message = format!("`transfer_id` must have from 1 to {LONGEST_ID} bytes");
        return refused("transfer_id", &message);
    }
    let (decode, prefill) = (
        found.do_remote_decode.unwrap_or(false),
        found.do_remote_prefill.unwrap_or(false),
    );
    match (decode, prefill) {
        (true, true) => refused(
            "do_remote_decode",
            "a prompt cannot both be sent (`do_remote_decode`) and come from elsewhere (`do_remote_prefill`)",
        ),
        (true, false) => Ok(Some(Remote::Decode {
            id: found.transfer_id,
        })),
        (false, true) => {
            let Some(id) = found.transfer_id else {
                let message = "`transfer_id` is missing: `do_remote_prefill` fetches what the prefill server offers under that name";
                return refused("transfer_id", message);
            };
            let address = match (found.remote_host, found.remote_port) {
                (Some(host), Some(port)) => Some((host, port)),
                (None, None) => None,
                _ => {
                    let message = "`remote_host` and `remote_port` belong together";
                    return refused("remote_host", message);
                }
            };
            Ok(Some(Remote::Prefill { id, address }))
        }
        (false, false) => Ok(None),
    }
}

/// The field in a prefill server's answer, which is passed on to the decode server unchanged.
pub(super) fn answer(connector: &Connector, id: &str) -> Value {
    let (host, port) = (connector.host(), connector.port());
    location(
        id,
        host.unwrap_or_default(),
        port.unwrap_or_default(),
        connector.engine_id(),
    )
}

fn location(id: &str, host: &str, port: u16, engine_id: &str) -> Value {
    json!({
        "do_remote_prefill": true,
        "do_remote_decode": false,
        "remote_host": host,
        "remote_port": port,
        "remote_engine_id": engine_id,
        "transfer_id": id,
    })
}

/// The error for a transfer on a server without transfers.
pub(super) fn no_transfers() -> ApiError {
    let message = "`kv_transfer_params`: this server takes no part in transfers of caches; it is started with --kv-transfer for that";
    ApiError::field("kv_transfer_params", message).code("unsupported_value")
}

/// The error for an import without an address.
pub(super) fn no_address() -> ApiError {
    let message = "`remote_host` and `remote_port` are missing, and this server was given no producer (--kv-transfer connect:HOST:PORT)";
    ApiError::field("kv_transfer_params.remote_host", message).code("missing_required_parameter")
}

/// The error for a request for the other role.
pub(super) fn wrong_role(field: &str, role: &str) -> ApiError {
    let field = format!("kv_transfer_params.{field}");
    let message = format!("`{field}`: this server is no {role}");
    ApiError::field(&field, message).code("unsupported_value")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;

    fn taken(text: &str) -> Result<Option<Remote>> {
        let body = format!("{{\"kv_transfer_params\": {text}}}");
        let mut fields = Fields::read(&Bytes::from(body))?;
        let remote = take(&mut fields)?;
        fields.finish()?;
        Ok(remote)
    }

    #[test]
    fn both_sides_are_read_with_what_proxies_add() {
        let decode = r#"{"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null}"#;
        assert_eq!(taken(decode).unwrap(), Some(Remote::Decode { id: None }));
        let passed_on = location("X", "h", 7, "e").to_string();
        let expected = Remote::Prefill {
            id: "X".to_owned(),
            address: Some(("h".to_owned(), 7)),
        };
        assert_eq!(taken(&passed_on).unwrap(), Some(expected));
        assert_eq!(taken("null").unwrap(), None);
        assert_eq!(taken("{\"remote_block_ids\": [1]}").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let said = |text: &str| {
            let body = taken(text).unwrap_err().body();
            body["error"]["param"].as_str().unwrap().to_owned()
        };
        assert_eq!(
            said(r#"{"do_remote_decode": true, "do_remote_prefill": true}"#),
            "kv_transfer_params.do_remote_decode"
        );
        assert_eq!(
            said(r#"{"do_remote_prefill": true}"#),
            "kv_transfer_params.transfer_id"
        );
        assert_eq!(
            said(r#"{"do_remote_prefill": true, "transfer_id": "X", "remote_host": "h"}"#),
            "kv_transfer_params.remote_host"
        );
        assert_eq!(
            said(r#"{"do_remote_prefill": true, "transfer_id": "X", "remote_port": 70000}"#),
            "kv_transfer_params.remote_port"
        );
        assert!(said(r#"{"zzz": 1}"#).starts_with("kv_transfer_params"));
    }
}
