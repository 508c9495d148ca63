//! TLS for the server: certificates from a directory as QEMU lays it out, and encrypted connections.
//!
//! Used by `negotiate` (which starts it) and `link` (which goes on with it). Nobody else knows of it. Client certificates are
//! demanded unless the operator does without.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, or is no PEM.
    #[error("Cannot load '{file}' from the TLS credentials: {reason}")]
    File {
        /// Its name in the directory.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// They do not belong together.
    #[error("Cannot use the TLS credentials: {0}")]
    Unusable(String),
}

/// What the server proves itself with, and whom it believes.
#[derive(Clone)]
pub struct TlsCredentials {
    config: Arc<ServerConfig>,
}

impl TlsCredentials {
    /// Reads `server-cert.pem`, `server-key.pem` and, to verify clients, `ca-cert.pem` of a directory.
    pub fn load(directory: &Path, verify_peer: bool) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates(directory, "server-cert.pem")?;
        let key = PrivateKeyDer::from_pem_file(directory.join("server-key.pem"))
            .map_err(|error| TlsError::File { file: "server-key.pem", reason: error.to_string() })?;
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let builder = if verify_peer {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(directory, "ca-cert.pem")? {
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unusable(&error))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = builder.with_single_cert(chain, key).map_err(|error| unusable(&error))?;
        Ok(Self { config: Arc::new(config) })
    }

    /// The server's end of a new session.
    pub(super) fn session(&self) -> io::Result<ServerConnection> {
        let mut session = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        // What is encrypted is sent before more is, so nothing piles up.
        session.set_buffer_limit(None);
        Ok(session)
    }
}

fn certificates(directory: &Path, file: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error: rustls::pki_types::pem::Error| TlsError::File { file, reason: error.to_string() };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(directory.join(file)).map_err(failed)?.collect();
    match found.map_err(failed)? {
        none if none.is_empty() => Err(TlsError::File { file, reason: "no certificate in it".to_owned() }),
        found => Ok(found),
    }
}

impl fmt::Debug for TlsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsCredentials").finish_non_exhaustive()
    }
}
