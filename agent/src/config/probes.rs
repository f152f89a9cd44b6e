//! A workload's probes, named and written as in the mesh file.

use serde::Serialize;

use crate::model;

/// What is asked of a pod, by the way in which it is.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Probe {
    HttpGet { path: String, port: u16 },
    TcpSocket { port: u16 },
    Grpc { port: u16, service: String },
}

impl From<&model::Probe> for Probe {
    fn from(probe: &model::Probe) -> Self {
        let port = probe.port;
        match &probe.ask {
            model::Ask::HttpGet { path } => Self::HttpGet {
                path: path.clone(),
                port,
            },
            model::Ask::TcpSocket => Self::TcpSocket { port },
            model::Ask::Grpc { service } => Self::Grpc {
                port,
                service: service.clone(),
            },
        }
    }
}
