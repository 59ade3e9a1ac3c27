// Holds custom resources (a JSON list on stdin) to validators generated from the operators' own CRDs.
//   node operators.mjs FOLDER_OF_NODE_MODULES
// Prints one line for each that is refused, and ends with status 1 if there is any.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh/v1alpha1": "keda",
  "gateway.networking.k8s.io/v1": "gateway-api",
  "monitoring.coreos.com/v1": "prometheus-operator",
  "cert-manager.io/v1": "cert-manager",
};

let refused = 0;
for (const manifest of JSON.parse(readFileSync(0, "utf-8"))) {
  const path = `${process.argv[2]}/@kubernetes-models/${PACKAGES[manifest.apiVersion]}/${manifest.apiVersion}/${manifest.kind}.js`;
  const module = await import(pathToFileURL(path));
  try {
    new module[manifest.kind](manifest).validate();
  } catch (error) {
    refused += 1;
    console.log(`${manifest.kind} ${manifest.metadata.name}: ${error.message}`);
  }
}
process.exit(refused ? 1 : 0);
