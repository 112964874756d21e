"""The manners every gRPC server and channel of Weft shares. Knows no service, no model and no artifact."""
