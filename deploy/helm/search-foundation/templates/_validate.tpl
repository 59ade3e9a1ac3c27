{{/* What the schema cannot say. Collects every problem, so that one run tells all. */}}
{{- define "sf.validate" -}}
{{- $problems := concat
  (include "sf.problemsOfPools" . | fromYamlArray)
  (include "sf.problemsOfGateway" . | fromYamlArray)
  (include "sf.problemsOfStores" . | fromYamlArray)
  (include "sf.problemsOfUpgrade" . | fromYamlArray) -}}
{{- if $problems -}}
{{- fail (printf "\n\nThe values do not fit together:\n  - %s\n" (join "\n  - " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "sf.problemsOfPools" -}}
{{- $root := . -}}
{{- $problems := list -}}
{{- $names := list -}}
{{- $owners := dict -}}
{{- $aliases := dict -}}
{{- $sharers := dict -}}
{{- range $pool := (include "sf.pools" . | fromYaml).pools -}}
{{- $at := printf "pool '%s'" .name -}}
{{- if has .name $names -}}
{{- $problems = append $problems (printf "%s: the name is used twice; give each pool its own." $at) -}}
{{- end -}}
{{- if has .name (list "gateway" "grpc" "redis" "postgresql") -}}
{{- $problems = append $problems (printf "%s: the name belongs to another part of the chart; choose another." $at) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- range $name, $model := .settings.model_aliases | default dict -}}
{{- with get $aliases $name -}}
{{- if ne . $model -}}
{{- $problems = append $problems (printf "%s: the alias '%s' stands for %s here and for %s in another pool; the gateway could not choose." $at $name $model .) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $aliases $name $model -}}
{{- end -}}
{{- range $capability := .capabilities -}}
{{- range $model := $pool.models -}}
{{- $key := printf "%s for %s" $model $capability -}}
{{- $_ := set $owners $key (add (get $owners $key | default 0) $pool.weight) -}}
{{- end -}}
{{- end -}}
{{- $problems = concat $problems (include "sf.problemsOfPool" (dict "root" $root "pool" $pool "at" $at) | fromYamlArray) -}}
{{- range $capability := .capabilities -}}
{{- $_ := set $sharers $capability (append (get $sharers $capability | default list) $pool.name) -}}
{{- end -}}
{{- end -}}
{{- range $key, $weight := $owners -}}
{{- if eq (int $weight) 0 -}}
{{- $problems = append $problems (printf "pools: every pool that serves %s has weight 0, so none would take its calls." $key) -}}
{{- end -}}
{{- end -}}
{{- $database := include "sf.storeSecret" (dict "root" . "store" "database") -}}
{{- range $capability := list "batch" "classify" -}}
{{- $names := get $sharers $capability | default list -}}
{{- if and (gt (len $names) 1) (not $database) -}}
{{- $problems = append $problems (printf "pools '%s' all serve %s and share its state in PostgreSQL; set database.existingSecret." (join "', '" $names) $capability) -}}
{{- end -}}
{{- end -}}
{{- $names := get $sharers "batch" | default list -}}
{{- if and (gt (len $names) 1) (not .Values.objectStore.url) -}}
{{- $problems = append $problems (printf "pools '%s' all serve batch and share its files; set objectStore.url." (join "', '" $names)) -}}
{{- end -}}
{{- toYaml $problems -}}
{{- end -}}

{{- define "sf.problemsOfPool" -}}
{{- $problems := list -}}
{{- $at := .at -}}
{{- $root := .root -}}
{{- with .pool -}}
{{- $scaling := .autoscaling -}}
{{- $most := int ($scaling.enabled | ternary $scaling.maxReplicas .replicas) -}}
{{- if $scaling.enabled -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- $problems = append $problems (printf "%s: autoscaling.minReplicas (%d) is above maxReplicas (%d)." $at (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $scaling.provider "keda") (or (lt (int $scaling.fallback.replicas) (int $scaling.minReplicas)) (gt (int $scaling.fallback.replicas) (int $scaling.maxReplicas))) -}}
{{- $problems = append $problems (printf "%s: autoscaling.fallback.replicas (%d) must lie between minReplicas and maxReplicas." $at (int $scaling.fallback.replicas)) -}}
{{- end -}}
{{- end -}}
{{- if $scaling.enabled -}}
{{- $metrics := $root.Values.metrics -}}
{{- if not (or $metrics.serviceMonitor.enabled $metrics.scrapeAnnotations $metrics.scrapedElsewhere) -}}
{{- $problems = append $problems (printf "%s: autoscaling reads metrics that nothing collects; set metrics.serviceMonitor.enabled or metrics.scrapeAnnotations, or metrics.scrapedElsewhere where your own set-up scrapes the pods." $at) -}}
{{- end -}}
{{- if eq (int $scaling.minReplicas) 0 -}}
{{- if ne $scaling.provider "keda" -}}
{{- $problems = append $problems (printf "%s: only the provider keda scales to zero; set autoscaling.minReplicas to 1 or more." $at) -}}
{{- end -}}
{{- if and (has "batch" .capabilities) (not (include "sf.storeSecret" (dict "root" $root "store" "database"))) -}}
{{- $problems = append $problems (printf "%s: batch scales to zero by the jobs in PostgreSQL; set database.existingSecret." $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .stateful (gt $most 1) (not (include "sf.storeSecret" (dict "root" $root "store" "database"))) -}}
{{- $problems = append $problems (printf "%s: several pods of %s share their state in PostgreSQL; set database.existingSecret." $at (join ", " .capabilities)) -}}
{{- end -}}
{{- if and (has "batch" .capabilities) (gt $most 1) (not $root.Values.objectStore.url) (not .persistence.existingClaim) -}}
{{- $problems = append $problems (printf "%s: several batch pods share their files; set objectStore.url, or persistence.existingClaim to a ReadWriteMany claim." $at) -}}
{{- end -}}
{{- if and (eq .device.type "cpu") .device.product -}}
{{- $problems = append $problems (printf "%s: device.product is set but device.type is cpu." $at) -}}
{{- end -}}
{{- $cache := .modelCache -}}
{{- if and (eq $cache.type "hostPath") (not (hasPrefix "/" $cache.path)) -}}
{{- $problems = append $problems (printf "%s: modelCache.type hostPath needs an absolute modelCache.path." $at) -}}
{{- end -}}
{{- if and (not (has $cache.type (list "hostPath" "image"))) $cache.path -}}
{{- $problems = append $problems (printf "%s: modelCache.path is only for type hostPath or image, not %s." $at $cache.type) -}}
{{- end -}}
{{- if and (ne $cache.type "pvc") $cache.existingClaim -}}
{{- $problems = append $problems (printf "%s: modelCache.existingClaim is only for type pvc, not %s." $at $cache.type) -}}
{{- end -}}
{{- if ne (eq $cache.type "image") (not (empty $cache.image)) -}}
{{- $problems = append $problems (printf "%s: modelCache.type image and modelCache.image go together." $at) -}}
{{- end -}}
{{- if and $cache.shared (ne $root.Values.poolDefaults.modelCache.accessMode "ReadWriteMany") -}}
{{- $problems = append $problems (printf "%s: pools share modelCache only by ReadWriteMany; set poolDefaults.modelCache.accessMode." $at) -}}
{{- end -}}
{{- if and $cache.readOnly (or (eq $cache.type "emptyDir") (and (eq $cache.type "pvc") (not $cache.existingClaim))) -}}
{{- $problems = append $problems (printf "%s: modelCache.readOnly needs a volume that holds the models: an existingClaim or a hostPath." $at) -}}
{{- end -}}
{{- if $cache.warmUp.enabled -}}
{{- if or (not (has $cache.type (list "pvc" "hostPath"))) $cache.readOnly -}}
{{- $problems = append $problems (printf "%s: modelCache.warmUp fills a volume that outlives pods; it needs type pvc or hostPath, and not readOnly." $at) -}}
{{- else if and (eq $cache.type "pvc") (not $cache.existingClaim) (ne $cache.accessMode "ReadWriteMany") -}}
{{- $problems = append $problems (printf "%s: modelCache.warmUp and pods would wait for each other's volume with accessMode %s; use ReadWriteMany." $at $cache.accessMode) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $cache.type "pvc") (not $cache.existingClaim) (ne $cache.accessMode "ReadWriteMany") (gt $most 1) -}}
{{- $problems = append $problems (printf "%s: %d pods cannot share a model cache of accessMode %s; use ReadWriteMany, an existingClaim or emptyDir." $at $most $cache.accessMode) -}}
{{- end -}}
{{- if and (eq $cache.type "pvc") (not $cache.existingClaim) (hasPrefix "ReadWriteOnce" $cache.accessMode) (not .stateful) (not (has (toString .strategy.maxSurge) (list "0" "0%"))) -}}
{{- $problems = append $problems (printf "%s: with a model cache of accessMode %s the new pod of an update may wait for the old one's volume for ever; set strategy.maxSurge to 0 and strategy.maxUnavailable to 1." $at $cache.accessMode) -}}
{{- end -}}
{{- if and (not .stateful) (has (toString .strategy.maxSurge) (list "0" "0%")) (has (toString .strategy.maxUnavailable) (list "0" "0%")) -}}
{{- $problems = append $problems (printf "%s: strategy.maxSurge and maxUnavailable are both 0, so an update could never begin." $at) -}}
{{- end -}}
{{- with .settings.drain_seconds -}}
{{- if ge (float64 .) (float64 $.pool.drain.graceSeconds) -}}
{{- $problems = append $problems (printf "%s: settings.drain_seconds must be below drain.graceSeconds." $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $problems -}}
{{- end -}}

{{- define "sf.problemsOfGateway" -}}
{{- $problems := list -}}
{{- $gateway := .Values.gateway -}}
{{- if $gateway.tls.enabled -}}
{{- $manager := $gateway.tls.certManager -}}
{{- if and $manager.enabled $gateway.tls.existingSecret -}}
{{- $problems = append $problems "gateway.tls: give existingSecret or certManager, not both." -}}
{{- else if and $manager.enabled (not $manager.issuerRef.name) -}}
{{- $problems = append $problems "gateway.tls.certManager: issuerRef.name says which issuer signs; it is empty." -}}
{{- else if not (or $manager.enabled $gateway.tls.existingSecret) -}}
{{- $problems = append $problems "gateway.tls: enabled, but neither existingSecret nor certManager.enabled is set." -}}
{{- end -}}
{{- end -}}
{{- if and $gateway.httpRoute.enabled (not $gateway.httpRoute.parentRefs) -}}
{{- $problems = append $problems "gateway.httpRoute: parentRefs names the Gateway to attach to; it is empty." -}}
{{- end -}}
{{- if and $gateway.grpcRoute.enabled (not $gateway.grpcRoute.parentRefs) -}}
{{- $problems = append $problems "gateway.grpcRoute: parentRefs names the Gateway to attach to; it is empty." -}}
{{- end -}}
{{- if and $gateway.grpcRoute.enabled (not $gateway.grpc.enabled) -}}
{{- $problems = append $problems "gateway.grpcRoute: needs gateway.grpc.enabled." -}}
{{- end -}}
{{- if $gateway.tls.enabled -}}
{{- if and (or $gateway.httpRoute.enabled $gateway.grpcRoute.enabled) (not (or $gateway.backendTls.caConfigMap $gateway.backendTls.systemAuthorities)) -}}
{{- $problems = append $problems "gateway.tls: the route's gateway would speak plain text to it; say in gateway.backendTls whom it trusts, or leave TLS to the route's gateway." -}}
{{- end -}}
{{- if and $gateway.ingress.enabled (not $gateway.ingress.annotations) -}}
{{- $problems = append $problems "gateway.tls: the ingress controller would speak plain text to it; tell it by its annotation in gateway.ingress.annotations, or leave TLS to the Ingress." -}}
{{- end -}}
{{- end -}}
{{- range $at, $service := dict "gateway.service" $gateway.service "gateway.grpc.service" $gateway.grpc.service -}}
{{- if and $service.nodePort (eq $service.type "ClusterIP") -}}
{{- $problems = append $problems (printf "%s: nodePort needs type NodePort or LoadBalancer." $at) -}}
{{- end -}}
{{- if and $service.loadBalancerSourceRanges (ne $service.type "LoadBalancer") -}}
{{- $problems = append $problems (printf "%s: loadBalancerSourceRanges needs type LoadBalancer." $at) -}}
{{- end -}}
{{- end -}}
{{- if and $gateway.autoscaling.enabled (gt (int $gateway.autoscaling.minReplicas) (int $gateway.autoscaling.maxReplicas)) -}}
{{- $problems = append $problems "gateway.autoscaling: minReplicas is above maxReplicas." -}}
{{- end -}}
{{- if and (has (toString $gateway.strategy.maxSurge) (list "0" "0%")) (has (toString $gateway.strategy.maxUnavailable) (list "0" "0%")) -}}
{{- $problems = append $problems "gateway.strategy: maxSurge and maxUnavailable are both 0, so an update could never begin." -}}
{{- end -}}
{{- $mtls := .Values.mtls -}}
{{- if $mtls.enabled -}}
{{- if and $mtls.certManager.enabled (or $mtls.gatewaySecret $mtls.poolSecret) -}}
{{- $problems = append $problems "mtls: give the two Secrets or certManager, not both." -}}
{{- else if and (not $mtls.certManager.enabled) (not (and $mtls.gatewaySecret $mtls.poolSecret)) -}}
{{- $problems = append $problems "mtls: enabled, but gatewaySecret and poolSecret are not both set and certManager.enabled is false." -}}
{{- end -}}
{{- end -}}
{{- toYaml $problems -}}
{{- end -}}

{{- define "sf.problemsOfStores" -}}
{{- $problems := list -}}
{{- $values := .Values -}}
{{- if and $values.database.existingSecret $values.evaluation.postgresql.enabled -}}
{{- $problems = append $problems "database.existingSecret and evaluation.postgresql.enabled exclude each other." -}}
{{- end -}}
{{- if and $values.redis.existingSecret $values.evaluation.redis.enabled -}}
{{- $problems = append $problems "redis.existingSecret and evaluation.redis.enabled exclude each other." -}}
{{- end -}}
{{- if and $values.objectStore.existingSecret (not $values.objectStore.url) -}}
{{- $problems = append $problems "objectStore.existingSecret is set but objectStore.url is empty." -}}
{{- end -}}
{{- $auth := $values.auth -}}
{{- if and $auth.existingSecret $auth.keys -}}
{{- $problems = append $problems "auth: give existingSecret or keys, not both." -}}
{{- end -}}
{{- $database := include "sf.storeSecret" (dict "root" . "store" "database") -}}
{{- $tiers := concat (list "free" "tier1" "tier2" "unlimited") (keys ($values.settings.tiers | default dict)) -}}
{{- range $auth.keys -}}
{{- if and .tier (not (has .tier $tiers)) -}}
{{- $problems = append $problems (printf "auth.keys: '%s' has tier '%s', which is none of %s; add it to settings.tiers." .id .tier (join ", " (sortAlpha $tiers))) -}}
{{- end -}}
{{- if and (hasKey . "balance") (not $database) -}}
{{- $problems = append $problems (printf "auth.keys: the balance of '%s' needs database.existingSecret to keep what is spent." .id) -}}
{{- end -}}
{{- end -}}
{{- if and $auth.enabled (not (include "sf.keysSecret" .)) (not $database) -}}
{{- $problems = append $problems "auth: nobody could call: set existingSecret, keys, bootstrapKey.enabled or a database that holds keys." -}}
{{- end -}}
{{- toYaml $problems -}}
{{- end -}}
