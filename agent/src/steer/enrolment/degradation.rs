//! What keeps a pod that is enrolled from being served as it should be.

/// Why a pod isn't served as it should be, though it is enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Degradation {
    /// An interface can't be steered and was set down.
    InterfaceRefused,
    /// An interface can't be steered and was left as it is.
    InterfaceUnsteered,
    /// The app listens on the mesh port: it isn't reached there from outside the pod.
    MeshPort,
    /// The audit found something that it couldn't put right.
    Unhealed,
}

impl Degradation {
    pub const ALL: [Self; 4] = [
        Self::InterfaceRefused,
        Self::InterfaceUnsteered,
        Self::MeshPort,
        Self::Unhealed,
    ];

    /// The word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InterfaceRefused => "interface_refused",
            Self::InterfaceUnsteered => "interface_unsteered",
            Self::MeshPort => "mesh_port",
            Self::Unhealed => "unhealed",
        }
    }
}
